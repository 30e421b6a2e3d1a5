"""The subjects of the measurements: how servers start, their clients' requests, and the expected answers."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import inputs
from bench.http_client import http_client, infer, post
from bench.load import Client
from bench.peers import Peer
from bench.reference import TOLERANCE, Reference
from bench.servers import HOST
from bench.websocket_client import read_outputs, steps_frame, websocket_client


class WrongAnswer(Exception):
    """A server gave a wrong answer, so its figures are meaningless."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server; `command` takes an empty folder, and has the word PORT in place of the port."""

    name: str
    command: Callable[[Path], tuple[str, ...]]
    ready_path: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """A server and its clients.

    Attributes:
        client: makes client number n.
        check: raises WrongAnswer if a client's last reply is wrong.
        optional: whether measurements continue if this subject fails.
    """

    name: str
    what: str
    launch: Launch
    client: Callable[[int], Client]
    check: Callable[[Client], None] = lambda client: None
    optional: bool = False


# ── without a model ──────────────────────────────────────────────────────────────────────────────


def _peer_module(name: str) -> Launch:
    return Launch(name, lambda folder: (sys.executable, "-m", f"bench.peers.{name}", "PORT"))


CANNED, ECHO, NOOP = _peer_module("canned"), _peer_module("echo"), _peer_module("noop")


def ceiling(request: bytes, reply_bytes: int) -> Subject:
    """The load generator's own limit for requests and replies of these sizes."""
    head, _, body = request.partition(b"\r\n\r\n")
    repeated = f"POST /{reply_bytes} HTTP/1.1".encode() + head[head.index(b"\r\n") :] + b"\r\n\r\n" + body
    what = "canned replies: the load generator's own limit"
    return Subject("ceiling", what, CANNED, lambda n: http_client([repeated]))


def ceiling_websocket(entries_bytes: int) -> Subject:
    path, values = f"/{entries_bytes}", np.zeros((1, (entries_bytes - 24) // 4), np.float32)
    requests = [steps_frame([0], values)]
    return Subject(
        "ceiling",
        "canned replies: the load generator's own limit",
        CANNED,
        lambda n: websocket_client(path, requests, (), None, 1),
    )


def echo(features: int) -> Subject:
    request = post("/", bytes(4 * features))
    return Subject("echo", "bare uvicorn sends the body back", ECHO, lambda n: http_client([request]))


def echo_websocket(features: int, entries: int = 1) -> Subject:
    requests = [steps_frame(range(entries), np.zeros((entries, features), np.float32))]
    return Subject(
        "ws-echo" if entries == 1 else f"ws-echo-{entries}",
        "bare uvicorn (websockets) sends the message back",
        ECHO,
        lambda n: websocket_client("/", requests, (), None, entries),
    )


def noop(features: int) -> Subject:
    row = inputs.rows(features)[0, 0].tolist()
    request = post("/steps", {"inputs": [row]})
    return Subject("noop", "a FastAPI route sends a pydantic body back", NOOP, lambda n: http_client([request]))


# ── Unroll ───────────────────────────────────────────────────────────────────────────────────────


def unroll(repository: Path, *options: str, name: str = "unroll") -> Launch:
    words = f"--host {HOST} --port PORT --device cpu --log-level warning".split()
    command = (sys.executable, "-m", "unroll", "serve", "--repository", str(repository), *words, *options)
    return Launch(name, lambda folder: command, "/v2/health/ready")


def raw_steps(launch: Launch, reference: Reference, key: str = "") -> Subject:
    name, what = ("unroll-key", "Unroll, raw bytes, with an API key") if key else ("unroll", "Unroll, raw bytes")
    return _native_steps(launch, reference, name, what, lambda row: row.tobytes(), _floats, {"x-api-key": key})


def json_steps(launch: Launch, reference: Reference) -> Subject:
    return _native_steps(
        launch,
        reference,
        "unroll-json",
        "Unroll, JSON",
        lambda row: {"inputs": [row.tolist()]},
        lambda body: np.array(json.loads(body)["outputs"][0], np.float32),
    )


def _native_steps(
    launch: Launch,
    reference: Reference,
    name: str,
    what: str,
    body: Callable[[np.ndarray], bytes | Mapping[str, object]],
    outputs: Callable[[bytes], np.ndarray],
    headers: Mapping[str, str] | None = None,
) -> Subject:
    sessions = f"/v1/models/{reference.name}/sessions"

    def client(n: int) -> Client:
        opening = [post(sessions, {"session_id": f"{name}-{n}"}, headers)]
        requests = [post(f"{sessions}/{name}-{n}/steps", body(row), headers) for row in reference.rows[n]]
        return http_client(requests, n, opening, unstepped=1)

    return Subject(name, what, launch, client, check_steps(name, reference, outputs))


def infer_steps(launch: Launch, reference: Reference) -> Subject:
    """The Open Inference Protocol, in the form that tritonclient.http writes."""

    def client(n: int) -> Client:
        first, *rest = reference.rows[n]
        opening = [infer_request(reference.name, n + 1, first, start=True)]
        return http_client([infer_request(reference.name, n + 1, row) for row in (*rest, first)], n, opening)

    what = "Unroll, Open Inference with binary tensors"
    check = check_steps("unroll-infer", reference, lambda body: _floats(body[-4 * reference.features :]))
    return Subject("unroll-infer", what, launch, client, check)


def infer_request(model: str, sequence: int, row: np.ndarray, *, start: bool = False) -> bytes:
    return infer(model, row[None], sequence_id=sequence, sequence_start=start, sequence_end=False)


def stream_steps(launch: Launch, reference: Reference, entries: int = 1) -> Subject:
    """WebSocket: client n steps `entries` sessions, from number n * entries on, in each frame."""
    name = "unroll-ws" if entries == 1 else f"unroll-ws-{entries}"

    def client(n: int) -> Client:
        sessions = range(n * entries, (n + 1) * entries)
        frames = [steps_frame(sessions, reference.rows[sessions, i]) for i in range(inputs.ROWS)]
        return websocket_client(f"/v1/models/{reference.name}/stream", frames, sessions, name, entries)

    def check(client: Client) -> None:
        handles, positions, values = (
            np.concatenate(parts) for parts in zip(*map(read_outputs, client.last), strict=True)
        )
        if sorted(handles) != [*client.sessions] or (positions != client.steps).any():
            raise WrongAnswer(f"{name}: sessions or positions are not those of step {client.steps}")
        every = 1 if client.steps == inputs.ROWS else 16
        sample = np.arange(0, len(handles), every)
        for i in sample:
            if not np.array_equal(values[i], reference.last(handles[i], client.steps)):
                raise WrongAnswer(f"{name}: session {handles[i]} got a wrong answer to step {client.steps}")

    plural = "time step" if entries == 1 else f"{entries} sessions' time steps"
    return Subject(name, f"Unroll, WebSocket, {plural} a frame", launch, client, check)


def raw_sequences(launch: Launch, reference: Reference, length: int) -> Subject:
    path = f"/v1/models/{reference.name}/sequences"

    def client(n: int) -> Client:
        return http_client([post(path, reference.sequences(length)[n].tobytes(), {"unroll-steps": str(length)})], n)

    def check(client: Client) -> None:
        found = _floats(client.last[0])
        if not np.array_equal(found, reference.sequence(client.sessions[0], length).ravel()):
            raise WrongAnswer(f"unroll: the outputs of sequence {client.sessions[0]} are wrong")

    return Subject("unroll", f"Unroll, raw bytes, {length} time steps a request", launch, client, check)


def _floats(body: bytes) -> np.ndarray:
    return np.frombuffer(body, np.float32)


def check_steps(name: str, reference: Reference, outputs: Callable[[bytes], np.ndarray]) -> Callable[[Client], None]:
    """Compares the last reply bit for bit with the expected answer to the session's whole input."""

    def check(client: Client) -> None:
        session = client.sessions[0]
        if client.steps and not np.array_equal(outputs(client.last[0]), reference.last(session, client.steps)):
            raise WrongAnswer(f"{name}: client {session} got a wrong answer to step {client.steps}")

    return check


# ── peers ────────────────────────────────────────────────────────────────────────────────────────


def peer_launch(peer: Peer, python: Path, models: Mapping[str, Path]) -> Launch:
    return Launch(peer.name, lambda folder: peer.command(python, models, folder), peer.ready_path)


def peer_steps(peer: Peer, launch: Launch, reference: Reference) -> Subject:
    def client(n: int) -> Client:
        first, *rest = reference.rows[n]
        requests = [peer.step(reference.name, n, i, row) for i, row in enumerate((*rest, first), start=1)]
        return http_client(requests, n, [peer.step(reference.name, n, 0, first)])

    def check(client: Client) -> None:
        session = client.sessions[0]
        expected = reference.torch_last(session, client.steps)
        if expected is None:
            expected = reference.last(session, client.steps)
        _check_close(peer, client, expected, reference.features)

    return Subject(peer.name, peer.what, launch, client, check, optional=True)


def peer_sequences(peer: Peer, launch: Launch, reference: Reference, length: int) -> Subject | None:
    """The subject for whole sequences; None if the peer does not support them."""

    def requests(n: int) -> Sequence[bytes]:
        request = peer.sequence(reference.name, reference.sequences(length)[n])
        return [] if request is None else [request]

    def check(client: Client) -> None:
        expected = reference.torch_sequence(client.sessions[0], length).ravel()
        _check_close(peer, client, expected, reference.features)

    if not requests(0):
        return None
    return Subject(peer.name, peer.what, launch, lambda n: http_client(requests(n), n), check, optional=True)


def _check_close(peer: Peer, client: Client, expected: np.ndarray, features: int) -> None:
    try:
        found = peer.outputs(client.last[0], features)
        right = found.shape == expected.shape and np.allclose(found, expected, rtol=0.0, atol=TOLERANCE)
    except (ValueError, KeyError, TypeError) as error:
        raise WrongAnswer(f"{peer.name}: {error}: {client.last[0][:400]!r}") from error
    if not right:
        raise WrongAnswer(f"{peer.name}: client {client.sessions[0]} got a wrong answer to request {client.answered}")
