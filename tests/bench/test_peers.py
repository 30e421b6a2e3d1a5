"""Every peer gives the model's answers, keeps its clients apart, and leaves no process behind.

A peer with its own environment is tested only where that environment exists.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from socket import create_connection, socket

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.http
from waiting import PATIENCE, until

from bench import environments
from bench.inputs import MODELS
from bench.peers import PEERS, Peer
from bench.peers.triton import TRITON
from bench.servers import HOST, Server, running_server

CLIENTS, STEPS, LENGTH = 3, 5, 128
TOLERANCE = 1e-5


@pytest.mark.long
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_peer_is_correct_and_leaves_no_process(peer: Peer, models: Path, tmp_path: Path) -> None:
    paths = {name: models / name / "1" / "model.onnx" for name in MODELS}
    with started(peer, paths, tmp_path) as server:
        for name, path in paths.items():
            check_steps(peer, name, path, server.port)
            check_sequence(peer, name, path, server.port)
        processes = descendants(server.process.pid)
    until(lambda: not any(alive(process) for process in processes), f"the end of all of {processes}")


def check_steps(peer: Peer, model: str, path: Path, port: int) -> None:
    """Clients step in turn on persistent connections, then the first one starts a new sequence."""
    values = random(CLIENTS, STEPS, model)
    connections = [create_connection((HOST, port), timeout=PATIENCE) for _ in range(CLIENTS)]
    for index in range(STEPS):
        for client, connection in enumerate(connections):
            found = ask(connection, peer, peer.step(model, client, index, values[client, index]), model)
            np.testing.assert_allclose(found, expected(path, values[client, : index + 1])[-1], atol=TOLERANCE)
    found = ask(connections[0], peer, peer.step(model, 0, 0, values[0, 0]), model)
    np.testing.assert_allclose(found, expected(path, values[0, :1])[-1], atol=TOLERANCE)
    for connection in connections:
        connection.close()


def check_sequence(peer: Peer, model: str, path: Path, port: int) -> None:
    values = random(1, LENGTH, model)[0]
    if (request := peer.sequence(model, values)) is None:
        return
    with create_connection((HOST, port), timeout=PATIENCE) as connection:
        for _ in range(2):
            found = ask(connection, peer, request, model)
            np.testing.assert_allclose(found, expected(path, values).ravel(), atol=TOLERANCE)


def ask(connection: socket, peer: Peer, request: bytes, model: str) -> np.ndarray:
    connection.sendall(request)
    reply = HTTPResponse(connection)
    reply.begin()
    body = reply.read()
    assert reply.status == 200, body
    return peer.outputs(body, MODELS[model].features)


def expected(path: Path, values: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state = np.zeros((1, next(node.shape[1] for node in session.get_inputs() if node.name == "state")), np.float32)
    feeds = {"x": values[None], "state": state, "sequence_lens": np.array([len(values)], np.int32)}
    y: np.ndarray = session.run(["y"], feeds)[0]
    return y[0]


def random(clients: int, steps: int, model: str) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((clients, steps, MODELS[model].features), np.float32)


@contextmanager
def started(peer: Peer, models: dict[str, Path], folder: Path) -> Iterator[Server]:
    python = environments.existing(peer.name, peer.environment)
    if python is None:
        pytest.skip(f"environment .bench/venvs/{peer.name} not built; make bench-peers")
    scratch = folder / "scratch"
    scratch.mkdir()
    command = peer.command(python, models, scratch)
    with running_server(command, os.sched_getaffinity(0), folder / "log", peer.ready_path) as server:
        yield server


def descendants(pid: int) -> list[int]:
    """Return the process and all its descendants, in any session or process group."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in descendants(int(child)))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_peer_without_requirements_runs_in_this_environment() -> None:
    assert environments.existing("naive", ()) == environments.ensure("naive", ())


def test_environment_is_reused_only_with_its_own_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "VENVS", tmp_path)
    (tmp_path / "some").mkdir()
    assert environments.existing("some", ("a==1",)) is None
    (tmp_path / "some" / "requirements.txt").write_text("a==1\n")
    assert environments.existing("some", ("a==1",)) == tmp_path / "some" / "bin" / "python"
    assert environments.existing("other", ("a==1",)) == tmp_path / "some" / "bin" / "python"
    assert environments.existing("some", ("a==2",)) is None


@pytest.mark.parametrize("index", [0, 7])
def test_triton_request_equals_its_own_clients(index: int) -> None:
    row = random(1, 1, "small")[0, 0]
    tensor = tritonclient.http.InferInput("x", [1, 1, len(row)], "FP32")
    tensor.set_data_from_numpy(row[None, None])
    body, length = tritonclient.http.InferenceServerClient.generate_request_body(
        [tensor],
        outputs=[tritonclient.http.InferRequestedOutput("y")],
        sequence_id=4,
        sequence_start=index == 0,
    )
    head, _, sent = TRITON.step("small", 3, index, row).partition(b"\r\n\r\n")
    assert sent == body
    assert f"\r\ninference-header-content-length: {length}\r\n".encode() in head + b"\r\n"
