"""Which clients may connect, and the disconnection of a client that does not read."""

import asyncio
import json
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import Running
from streams import Dial, Plain, frame
from waiting import PATIENCE, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from unroll.service.api.stream import endpoint
from unroll.service.api.stream.flow import WINDOW
from unroll.service.settings import Settings
from unroll.service.transport.websocket import StreamProtocol

Background = Callable[..., Future]


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("nobody", 404, "model_unknown"),
        ("lstm:7", 404, "model_unknown"),
        ("whole", 422, "not_streamable"),
        ("%00", 404, "model_unknown"),
    ],
)
def test_models_that_cannot_be_streamed(any_server: Running, dial: Dial, model: str, status: int, code: str):
    with pytest.raises(InvalidStatus) as refusal:
        dial(running=any_server, model=model)
    response = refusal.value.response
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert json.loads(response.body)["code"] == code


def test_a_refused_connection_is_not_logged_as_an_error(
    server: Running, dial: Dial, client: httpx.Client, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(InvalidStatus):
        dial(model="nobody")
    assert client.get("/livez").status_code == 200  # the application has returned by now
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_pages_of_other_origins_are_refused(any_server: Running, dial: Dial):
    """A browser sends the page's origin, which must be the server's own; other clients send none."""
    dial(running=any_server, origin=f"http://{any_server.address}")
    for origin in ("http://evil.example", "null", "http://[", f"http://{any_server.address}.evil.example"):
        with pytest.raises(InvalidStatus) as refusal:
            dial(running=any_server, origin=origin)
        assert refusal.value.response.status_code == 403


async def test_a_server_without_denial_responses_closes_with_a_code(server: Running):
    """The server can only close the connection, with a code that gives the reason."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/models/nobody/stream", "headers": [], "query_string": b"", "asgi": {}}
    await server_app(server)(scope, receive, send)
    assert [(message["type"], message.get("code")) for message in sent] == [
        ("websocket.accept", None),
        ("websocket.close", 4404),
    ]


def server_app(running: Running) -> Callable:
    return running.uvicorn.config.loaded_app


@pytest.mark.parametrize("kind", [Running, pytest.param(Plain, marks=pytest.mark.long)])
def test_a_client_that_does_not_read(
    repository: Path,
    dial: Dial,
    background: Background,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Running],
    x: np.ndarray,
):
    """Reading stops, then the connection is cut; its sessions stay, and other connections are unaffected."""
    monkeypatch.setattr(endpoint, "router", partial(endpoint.router, stalled_seconds=0.5))
    running = kind(Settings(repository=repository))
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", running.port))
    try:
        client = dial(running=running, sock=deaf, max_queue=1)
        names = client.bind(*range(64), depth=64)
        chunk = frame(*[(handle, None, np.zeros((100, 3), "<f4")) for handle in range(64)])
        (stalled,) = running.server.streams

        def flood() -> None:
            with suppress(ConnectionClosed):
                for _ in range(10_000):  # 800 MB, were they taken
                    client.socket.send(chunk)
                pytest.fail("the server took everything")

        flooding = background(flood)
        until(lambda: "paused" in repr(stalled))
        other = dial(running=running)
        other.bind(0)
        assert other.step((0, 0, x))[0].position == 12
        until(lambda: stalled not in running.server.streams, "the end of the deaf client")
        hang_up(deaf)
        flooding.result(PATIENCE)
        (resumed,) = other.open({"handle": 1, "session_id": names[0], "mode": "resume", "depth": 64})
        assert resumed["position"] > 0
        assert other.step((1, None, x))[1].steps == 12
    finally:
        hang_up(deaf)
        running.stop()


def hang_up(connection: socket.socket) -> None:
    """Also for coroutines waiting to write to it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def test_a_pong_that_the_server_does_not_read_is_not_missed(dial: Dial, server: Running, x: np.ndarray) -> None:
    """The server pauses reading when too much is unanswered, possibly for longer than the pong timeout."""
    client = dial()
    client.bind(*range(WINDOW + 1))
    (protocol,) = server.uvicorn.server_state.connections
    assert isinstance(protocol, StreamProtocol)

    def in_loop(call: Callable[[], None]) -> None:
        async def run() -> None:
            call()

        asyncio.run_coroutine_threadsafe(run(), server.uvicorn.loop).result(PATIENCE)

    with server.holding("lstm"):
        client.socket.send(frame(*[(handle, 0, x[:1]) for handle in range(WINDOW + 1)]))
        until(lambda: not protocol.transport.is_reading(), "a full window")
        in_loop(protocol.send_keepalive_ping)
        in_loop(protocol.keepalive_timeout)
    good, bad = client.receive(WINDOW + 1)
    assert (len(good), bad) == (WINDOW + 1, [])
