"""Clients that are silent, slow, or do not read are answered or disconnected in time; other clients are served."""

import asyncio
import socket
from collections.abc import Iterator

import numpy as np
import pytest
from raw_http import STEP, Wire, request
from served_models import models
from serving import Running
from waiting import PATIENCE, reached, turns, until

from unroll.service.settings import Settings
from unroll.service.transport.connections import unsent

HALF_A_HANDSHAKE = b"GET /v1/models/lstm/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upg"
SEQUENCES, SESSIONS = "/v1/models/lstm/sequences", "/v1/models/lstm/sessions"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with short timeouts and a minimum rate."""
    repository = models.link(tmp_path_factory.mktemp("impatient"), "lstm")
    running = Running(Settings(repository=repository, head_timeout=0.5, keep_alive=0.5, min_rate=1000))
    yield running
    running.stop()


def waited(server: Running) -> None:
    """Wait for longer than `head_timeout`."""
    silent = Wire(server.port)
    assert silent.closed()
    silent.socket.close()


@pytest.fixture
def slow(impatient: Running) -> Iterator[Wire]:
    wire = Wire(impatient.port)
    yield wire
    wire.socket.close()


@pytest.mark.parametrize("line_ends", [b"", b"\r\n\r\n"], ids=["silent", "only line ends"])
def test_a_connection_without_a_request_is_closed(slow: Wire, line_ends: bytes) -> None:
    slow.send(line_ends)
    assert slow.closed()


def test_a_connection_without_another_request_is_closed(slow: Wire) -> None:
    slow.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert slow.answer()[0] == 200
    assert slow.closed()


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /liv",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\r\n",
        HALF_A_HANDSHAKE,
        request(SEQUENCES, 100 * STEP.tobytes())[:-1100],
        request(SESSIONS, b'{"session_id": "slow"}')[:-5],
        request(SEQUENCES, b"c\r\n", "Transfer-Encoding: chunked"),
        request(SEQUENCES)[:40],
    ],
    ids=["request line", "head", "handshake", "body", "body of a route of FastAPI", "chunk", "before a body"],
)
def test_stalled_request_is_answered_by_408(slow: Wire, begin: bytes) -> None:
    slow.send(begin)
    status, headers, content = slow.answer()
    assert (status, headers["connection"]) == (408, "close")
    assert b'"request_timeout"' in content
    slow.end()
    assert slow.closed()


@pytest.mark.parametrize("begin", [b"GET /livez HTTP/1.1\r\nX: ", request(SEQUENCES, bytes(120_000))[:-110_000]])
def test_a_request_that_trickles_is_answered_by_408(slow: Wire, begin: bytes) -> None:
    slow.send(begin)
    slow.socket.settimeout(0)

    def answered() -> bool:
        slow.send(b"a")  # at most 500 bytes a second
        try:
            return bool(slow.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    until(answered)
    slow.socket.settimeout(PATIENCE)
    assert slow.answer()[0] == 408


def test_a_slow_body_that_keeps_coming_is_served(impatient: Running, slow: Wire) -> None:
    body = np.zeros((10_000, 3), np.float32).tobytes()
    sent = request(SEQUENCES, body, steps=10_000)
    slow.send(sent[:200])
    waiting = Wire(impatient.port)
    waiting.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert waiting.answer()[0] == 200  # the first part has been read by now
    slow.send(sent[200:100_000])  # enough bytes to allow for 100 seconds
    waited(impatient)
    slow.send(sent[100_000:])
    assert slow.answer()[0] == 200
    waiting.socket.close()


def test_a_request_behind_one_that_runs_has_its_own_time(impatient: Running, slow: Wire) -> None:
    with impatient.holding("lstm") as held:
        slow.send(request(SEQUENCES) + b"GET /livez HT")
        held.wait()
        waited(impatient)
    assert slow.answer()[0] == 200
    assert slow.answer()[0] == 408


def test_work_that_takes_long_is_not_timed_by_the_connection(impatient: Running, slow: Wire) -> None:
    with impatient.holding("lstm") as held:
        slow.send(request(SEQUENCES))
        held.wait()
        waited(impatient)
        waited(impatient)
    assert slow.answer()[0] == 200


def test_a_client_that_does_not_read_is_disconnected(impatient: Running) -> None:
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", impatient.port))
        reader.sendall(200 * b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")  # more than the kernel holds
        until(lambda: reader.recv(1, socket.MSG_PEEK), "an answer")
        until(lambda: not impatient.uvicorn.server_state.connections, "the end of the connection")
        received = b""
        while data := reader.recv(65536):
            received += data
        assert received.count(b"HTTP/1.1 200 ") < 200


async def test_bytes_read_from_the_kernels_buffer_count_as_progress() -> None:
    """The transport's own buffer does not shrink during this time, so a slow reader would look like a stalled one."""
    opened = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda _, writer: opened.set_result(writer.transport), "127.0.0.1", 0)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # a small window
        reader.connect(server.sockets[0].getsockname())
        transport = await opened
        transport.write(bytes(40_000_000))  # more than the kernel holds
        before, waiting = 0, 0
        while (before, waiting) != (before := unsent(transport), waiting := transport.get_write_buffer_size()):
            await turns(50)
        taken = len(reader.recv(200_000, socket.MSG_WAITALL))
        await reached(lambda: unsent(transport) <= before - taken // 4, "room in the kernel's buffer")
        assert transport.get_write_buffer_size() == waiting
        transport.abort()
    server.close()
    await server.wait_closed()
