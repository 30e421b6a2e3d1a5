"""The cost of the Python client: its steps compared with those of a bare connection and of tritonclient."""

import http.client
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import tritonclient.http as triton

import unroll
from bench import inputs
from bench.load import repeated
from bench.outcomes import Outcome, ratio
from bench.servers import HOST
from bench.turns import Bench, Turn, by_name

_MODEL, _SESSIONS = "small", 64


def python_client(bench: Bench) -> list[Outcome]:
    """One client that waits for each answer: one step per request, and 64 sessions per message."""
    x = inputs.rows(inputs.MODELS[_MODEL].features)[:_SESSIONS, 0]
    with bench.servers() as servers, ExitStack() as stack:
        port = servers.server(bench.unroll()).port
        client = stack.enter_context(unroll.Client(f"http://{HOST}:{port}"))
        session = stack.enter_context(client.session(_MODEL))
        stream = stack.enter_context(client.stream(_MODEL))
        sessions = stream.open(_SESSIONS)
        other = stack.enter_context(triton.InferenceServerClient(f"{HOST}:{port}"))
        turns = [
            _turn("bare", "http.client, keep-alive, raw bytes", _bare(client, port, x[0]), 1),
            _turn("client", "unroll.Client: session.step", lambda: session.step(x[0]), 1),
            _turn("triton", "tritonclient: infer, binary tensors", _triton(other, x[0]), 1),
            _turn("stream-1", "unroll.Client: a stream of one session", lambda: sessions[0].step(x[0]), 1),
            _turn("stream-64", f"the same, {_SESSIONS} sessions", lambda: stream.step(sessions, x), _SESSIONS),
        ]
        rows = by_name(bench.alternate(turns))
    targets = [
        ("a step a request: of a bare connection", 0.8, "client", "bare"),
        ("a step a request: of tritonclient", 1.0, "client", "triton"),
        (f"{_SESSIONS} sessions on a stream: of a bare connection", 5.0, "stream-64", "bare"),
    ]
    verdicts = [
        ratio(15, f"Python client, {says}", bound, rows[row], rows[other]) for says, bound, row, other in targets
    ]
    return [Outcome("python-client", "One client in Python, LSTM 2×64", "steps/s", [*rows.values()], verdicts)]


def _turn(name: str, what: str, step: Callable[[], object], steps: int) -> Turn:
    """A turn that repeats `step`; a call makes `steps` time steps."""

    return Turn(name, what, lambda seconds: repeated(step, seconds, steps), check=step)


def _bare(client: unroll.Client, port: int, x: np.ndarray) -> Callable[[], bytes]:
    """A minimal hand-written client: it numbers the steps, but retries nothing."""
    path = f"/v1/models/{_MODEL}/sessions/{client.session(_MODEL).id}/steps"
    connection = http.client.HTTPConnection(HOST, port)
    position = 0

    def step() -> bytes:
        nonlocal position
        headers = {"Content-Type": "application/octet-stream", "Unroll-Position": str(position)}
        connection.request("POST", path, x.tobytes(), headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        position += 1
        return content

    return step


def _triton(client: triton.InferenceServerClient, x: np.ndarray) -> Callable[[], np.ndarray]:
    start = True

    def step() -> np.ndarray:
        nonlocal start
        tensor = triton.InferInput("x", [1, 1, len(x)], "FP32")
        tensor.set_data_from_numpy(x.reshape(1, 1, -1))
        result = client.infer(_MODEL, [tensor], sequence_id=1, sequence_start=start)
        start = False
        return result.as_numpy("y")

    return step
