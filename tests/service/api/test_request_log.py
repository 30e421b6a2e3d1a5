"""The request log: which requests write a line, and its content."""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import wire
from problems import GOOD
from serving import RAW, Running, Serve
from streams import frame
from structlog.testing import capture_logs
from waiting import until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from unroll.service.settings import Settings
from unroll.service.telemetry.request_log import LINES_PER_SECOND, RequestLog

Lines = Callable[[], list[dict[str, Any]]]


def digest(session_id: str) -> str:
    return hashlib.sha256(session_id.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Running]:
    """A separate server, as lines per second are limited and other tests write many."""
    running = Running(Settings(repository=repository))
    yield running
    running.stop()


@pytest.fixture
def lines() -> Iterator[Lines]:
    with capture_logs() as captured:
        yield lambda: [
            {name: value for name, value in line.items() if name not in ("event", "log_level")}
            for line in captured
            if line["event"] == "request"
        ]


@pytest.fixture
def opened(client: httpx.Client) -> str:
    return str(client.post("/v1/models/lstm/sessions").json()["session_id"])


def test_refused_step_logs_session_position_and_expected_position(client: httpx.Client, opened: str, lines: Lines):
    path = f"/v1/models/lstm/sessions/{opened}/steps"
    client.post(path, json={"inputs": GOOD, "position": 3})
    client.post(path, content=bytes(12), headers={**RAW, "Unroll-Position": "7"})
    client.post(path, content=bytes(13), headers={**RAW, "Expect": "100-continue"})  # answered by FastAPI's route
    about = {"route": "v1/steps", "model": "lstm", "session": digest(opened)}
    gap = {**about, "status": 409, "code": "position_gap", "expected": 0}
    assert lines() == [
        {**gap, "position": 3},
        {**gap, "position": 7},
        {**about, "status": 422, "code": "invalid_shape"},
    ]
    assert opened not in str(lines())


def test_a_client_that_leaves_amid_its_body(server: Running, lines: Lines):
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        head = "POST /v1/models/lstm/sessions/a/fork HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        leaving.sendall(f"{head}\r\nContent-Length: 9\r\n\r\n{{".encode())
    until(lambda: len(lines()) == 2, "the end of the request")
    refused, gone = lines()
    assert refused == {"route": "invalid HTTP", "status": 400, "code": "malformed_request"}
    about = {"route": "POST /v1/models/{model}/sessions/{session_id}/fork", "model": "lstm", "session": digest("a")}
    assert gone == {**about, "status": 499, "code": "cancelled"}


def test_a_refused_step_of_a_sequence(client: httpx.Client, lines: Lines):
    x = np.float32(GOOD)[None]
    wire.infer(client, "lstm", x, sequence_id="unknown", sequence_position=2)
    (line,) = lines()
    assert line == {
        "route": "v2/infer",
        "status": 400,
        "code": "session_unknown",
        "model": "lstm",
        "session": digest("unknown"),
        "position": 2,
    }


def test_a_step_that_fails_later(client: httpx.Client, lines: Lines):
    """The request object no longer exists at that time."""
    session = client.post("/v1/models/hot/sessions").json()["session_id"]
    client.post(f"/v1/models/hot/sessions/{session}/steps", json={"inputs": [[3e38, 1, 1]], "position": 0})
    (line,) = lines()
    assert (line["code"], line["session"], line["position"]) == ("non_finite_output", digest(session), 0)


def test_other_routes(client: httpx.Client, server: Running, lines: Lines):
    client.get("/v1/models/lstm/sessions/never/state")
    client.get("/v1/models/none")
    client.get("/nothing")
    client.put("/v1/models")
    client.get("/livez")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        connection.recv(100)
    found = [(line["route"], line["status"], line["code"], line.get("session")) for line in lines()]
    assert found == [
        ("GET /v1/models/{model}/sessions/{session_id}/state", 404, "session_unknown", digest("never")),
        ("GET /v1/models/{model}", 404, "model_unknown", None),
        ("GET no such path", 404, "not_found", None),
        ("PUT /v1/models", 405, "method_not_allowed", None),
        ("invalid HTTP", 400, "malformed_request", None),
    ]


def test_streams(server: Running, opened: str, lines: Lines):
    with pytest.raises(InvalidStatus):
        connect(f"ws://{server.address}/v1/models/none/stream").__enter__()
    with connect(f"ws://{server.address}/v1/models/lstm/stream") as stream:
        for message in (
            "nonsense",
            json.dumps({"op": "open", "sessions": [{"handle": 0, "session_id": opened}]}),
            json.dumps({"op": "open", "sessions": [{"handle": 0, "session_id": opened, "mode": "resume"}]}),
            frame((0, 5, np.float32(GOOD))),
        ):
            stream.send(message)
            stream.recv()
    found = [(line["code"], line.get("session"), line.get("position"), line.get("expected")) for line in lines()]
    assert found == [
        ("model_unknown", None, None, None),
        ("malformed_request", None, None, None),
        ("session_exists", digest(opened), None, None),
        ("position_gap", digest(opened), 5, 0),
    ]
    assert {line["route"] for line in lines()} == {"v1/stream"}


@pytest.mark.parametrize(
    ("which", "statuses"), [("none", []), ("errors", [404, 404]), ("all", [200, 404, 201, 200, 404])]
)
def test_which_requests_leave_a_line(serve: Serve, which: str, statuses: list[int]):
    running = serve(log_requests=which)
    with httpx.Client(base_url=running.url) as client, capture_logs() as captured:
        client.get("/livez")
        client.get("/v1/models/none")
        session = client.post("/v1/models/lstm/sessions").json()["session_id"]
        client.post(f"/v1/models/lstm/sessions/{session}/steps", json={"inputs": GOOD})
        client.post("/v1/models/lstm/sessions/never/steps", json={"inputs": GOOD})
    assert [line["status"] for line in captured if line["event"] == "request"] == statuses


def test_lines_are_limited_and_those_left_out_are_counted(lines: Lines):
    now = 5.0
    log = RequestLog("errors", lambda: now)
    for _ in range(LINES_PER_SECOND + 7):
        log.write("v1/steps", 404, "session_unknown", session="a")
    assert len(lines()) == LINES_PER_SECOND
    now = 6.0
    log.write("v1/steps", 404, "session_unknown", session="a")
    assert lines()[-1]["left_out"] == 7
    assert len(lines()) == LINES_PER_SECOND + 1
