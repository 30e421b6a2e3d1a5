"""The whole server on a GPU: WebSocket frames that carry one step of each of many sessions."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import uvloop

from bench.internals.gpu.engine import DEVICE
from bench.internals.gpu.shapes import FEATURES, Shape, bundle_of, model
from bench.load import Client, Load, Measurement
from bench.servers import HOST, on_cores, running_server
from bench.turns import require_no_errors
from bench.websocket_client import read_outputs, steps_frame, websocket_client

_TOLERANCE = 1e-4
_FRAMES = 16
_SERVER_CORES = {0, 1}


@dataclass(frozen=True, slots=True)
class Streamed:
    """The figures of one stream.

    Attributes:
        steps: steps per second.
        p50, p99: milliseconds from a frame to its answer.
        engine: steps per second of the engine by itself, in calls with equally many rows.
    """

    title: str
    connections: int
    entries: int
    steps: float
    p50: float
    p99: float
    engine: float


def measure(
    shape: Shape, connections: int, entries: int, engine_rate: float, repository: Path, seconds: float, folder: Path
) -> Streamed:
    """Raises AssertionError if an answer differs from PyTorch's."""
    bundle_of(shape, repository)
    only = folder / shape.name
    only.mkdir(exist_ok=True)
    if not (only / shape.name).exists():
        (only / shape.name).symlink_to(repository / shape.name)
    words = f"--host {HOST} --port PORT --device {DEVICE} --max-batch {entries} --log-level warning".split()
    command = [sys.executable, "-m", "unroll", "serve", "--repository", str(only), *words]
    log = folder / f"{shape.name}-{entries}.log"
    with running_server(command, _SERVER_CORES, log, "/v2/health/ready") as server, on_cores({4}):
        values = np.random.default_rng(1).standard_normal((connections * entries, _FRAMES, FEATURES), np.float32)
        clients = [_client(shape, n, entries, values) for n in range(connections)]
        measured = uvloop.run(_run(server.port, clients, seconds))
    _check(shape, clients, values)
    return Streamed(shape.title, connections, entries, measured.rate, measured.p50, measured.p99, engine_rate)


def _client(shape: Shape, n: int, entries: int, values: np.ndarray) -> Client:
    sessions = range(n * entries, (n + 1) * entries)
    frames = [steps_frame(sessions, values[sessions.start : sessions.stop, i]) for i in range(_FRAMES)]
    return websocket_client(f"/v1/models/{shape.name}/stream", frames, sessions, "gpu", entries)


async def _run(port: int, clients: list[Client], seconds: float) -> Measurement:
    async with Load(port, clients) as load:
        require_no_errors("unroll", await load.run_once())
        return require_no_errors("unroll", await load.run(seconds))


def _check(shape: Shape, clients: list[Client], values: np.ndarray) -> None:
    """Compare the last answers of some sessions with PyTorch over their whole input."""
    reference = model(shape).cuda()
    for client in clients:
        handles, positions, answers = (
            np.concatenate(parts) for parts in zip(*map(read_outputs, client.last), strict=True)
        )
        assert (positions == client.steps).all()
        sample = np.linspace(0, len(handles) - 1, 16).astype(int)
        sent = values[handles[sample]][:, np.arange(client.steps) % _FRAMES]
        with torch.inference_mode():
            expected = reference(torch.from_numpy(sent).cuda())[:, -1].cpu().numpy()
        assert np.allclose(answers[sample], expected, rtol=0, atol=_TOLERANCE)
