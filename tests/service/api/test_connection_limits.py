"""More connections than the limit: idle ones are closed to make room, and health probes are answered."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from processes import Launched, Process, StartProcess
from raw_http import UPGRADE, Wire, request
from serving import Running, Serve, metric
from waiting import until

HALF_A_REQUEST = b"GET /livez HTTP/1.1\r\nX: "
#: `unroll serve` with few descriptors.
SHORT_OF_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from unroll.cli import main
sys.argv = ["unroll", "serve", *sys.argv[1:]]
sys.exit(main())
"""


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@pytest.fixture
def dial() -> Iterator[Callable[[int], Wire]]:
    """`dial(port)` opens a connection and closes it after the test."""
    with ExitStack() as opened:

        def call(port: int) -> Wire:
            wire = Wire(port)
            opened.callback(wire.socket.close)
            return wire

        yield call


def occupied(dial: Callable[[int], Wire], running: Running, count: int) -> list[Wire]:
    """Open connections that are in the middle of a request."""
    wires = [dial(running.port) for _ in range(count)]
    for wire in wires:
        wire.send(get("/livez"))
        assert wire.answer()[0] == 200
        wire.send(HALF_A_REQUEST)
    return wires


def scrape(dial: Callable[[int], Wire], running: Running, name: str, **labels: str) -> float:
    wire = dial(running.port)
    wire.send(get("/metrics"))
    return metric(wire.answer()[2].decode(), name, **labels)


def test_beyond_the_limit_probes_are_answered_and_others_refused(serve: Serve, dial: Callable[[int], Wire]) -> None:
    running = serve(max_connections=3)
    busy = occupied(dial, running, 3)
    assert scrape(dial, running, "unroll_connections") == 4  # including the scrape's connection
    for path in ("/livez", "/readyz", "/metrics", "/v2/health/ready"):
        wire = dial(running.port)
        wire.send(get(path))
        status, headers, _ = wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert wire.closed()
    for refused in (get("/v1/models"), request("/v1/models/lstm/sequences"), get("/v2/models/lstm")):
        wire = dial(running.port)
        wire.send(refused)
        status, headers, content = wire.answer()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert b'"too_many_connections"' in content
    assert scrape(dial, running, "unroll_connections_refused_total", limit="process") == 3
    busy[0].send(b"\r\nHost: localhost\r\n\r\n")
    assert busy[0].answer()[0] == 200
    wire = dial(running.port)
    wire.send(get("/v1/models"))  # the answered connection is now idle and makes room
    assert wire.answer()[0] == 200
    assert busy[0].closed()


def test_oldest_idle_connections_make_room_first(serve: Serve, dial: Callable[[int], Wire]) -> None:
    running = serve(max_connections=3)
    wires = []
    for _ in range(5):
        wires.append(dial(running.port))
        wires[-1].send(get("/v1/models"))
        assert wires[-1].answer()[0] == 200
    assert [wire.closed() for wire in wires[:2]] == [True, True]
    for wire in wires[2:]:
        wire.send(get("/v1/models"))
        assert wire.answer()[0] == 200


def test_a_stream_counts_as_a_connection_until_it_ends(serve: Serve, dial: Callable[[int], Wire]) -> None:
    running = serve(max_connections=1)
    stream = dial(running.port)
    stream.send(UPGRADE)
    assert stream.head()[0] == 101
    other = dial(running.port)
    other.send(get("/v1/models"))
    assert other.answer()[0] == 503
    stream.socket.close()
    wait = dial(running.port)
    wait.send(get("/livez"))
    assert wait.answer()[0] == 200
    last = dial(running.port)
    last.send(get("/v1/models"))
    assert last.answer()[0] == 200


def test_handshake_that_waits_for_its_turn_makes_no_room(
    serve: Serve, dial: Callable[[int], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(max_connections=1)
    stream, turns = dial(running.port), list[Callable[[], None]]()
    with monkeypatch.context() as patch:
        patch.setattr(running.server.turns, "call", turns.append)
        stream.send(UPGRADE)
        until(lambda: bool(turns), "the handshake")
        other = dial(running.port)
        other.send(get("/v1/models"))
        assert other.answer()[0] == 503
    running.uvicorn.loop.call_soon_threadsafe(turns.pop())
    assert stream.head()[0] == 101


def test_one_address_may_have_fewer_than_all(serve: Serve, dial: Callable[[int], Wire]) -> None:
    running = serve(max_connections_per_address=2)
    occupied(dial, running, 2)
    wire = dial(running.port)
    wire.send(get("/v1/models"))
    assert wire.answer()[0] == 503
    assert scrape(dial, running, "unroll_connections_refused_total", limit="address") == 1
    with socket.create_connection(("127.0.0.1", running.port), source_address=("127.0.0.2", 0)) as other:
        other.sendall(get("/v1/models"))
        assert other.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_connections_awaiting_refusal_are_bounded(serve: Serve, dial: Callable[[int], Wire]) -> None:
    running = serve(max_connections=1)
    occupied(dial, running, 1)
    beyond = []
    for _ in range(60):
        beyond.append(dial(running.port))
        beyond[-1].send(HALF_A_REQUEST)
    wire = dial(running.port)
    wire.send(get("/livez"))
    assert wire.answer()[0] == 200
    assert len(running.uvicorn.server_state.connections) < 40
    assert beyond[0].closed()


def test_silent_connections_do_not_silence_a_server_that_is_short_of_files(start_process: StartProcess) -> None:
    process: Process = start_process(script=SHORT_OF_FILES)
    port = httpx.URL(process.url).port
    assert port is not None
    with ExitStack() as opened:
        for _ in range(260):
            opened.callback(Wire(port).socket.close)
        with httpx.Client(base_url=process.url) as client:
            for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
                assert client.get(path).status_code == 200


def test_more_connections_than_files_are_refused_at_the_start(shelf: Path) -> None:
    process = Launched("--repository", str(shelf), "--port", "0", "--max-connections", "500", script=SHORT_OF_FILES)
    _, log = process.communicate()
    assert process.returncode == 1
    assert "--max-connections 500: the limit of open files allows " in log
