"""Shutdown: every message read is answered, and each client gets the positions of its sessions."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_link import Wire
from serving import Oracle, Running, Serve
from streams import Client, Dial, Plain, frame, last_messages, replies
from waiting import PATIENCE, reached
from websockets.exceptions import ConnectionClosed

from unroll.service.api.stream.connection import GOODBYES
from unroll.service.api.stream.control import SLICE
from unroll.service.settings import Settings

Oracles = Callable[..., Oracle]


Background = Callable[..., Future]


def goodbyes_of(client: Client) -> dict[int, dict]:
    """The goodbyes by handle; the server sends nothing else before it closes the connection."""
    goodbyes: dict[int, dict] = {}
    for message in last_messages(client):
        text = json.loads(message)
        assert text["op"] == "closing"
        assert 1 <= len(text["sessions"]) <= GOODBYES
        goodbyes |= {item["handle"]: item for item in text["sessions"]}
    return goodbyes


def test_goodbyes_describe_every_session(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    number = 2 * GOODBYES + 1
    x = rng.standard_normal((number, 9, 3)).astype("<f4")
    client = dial(running=any_server)
    ids = client.bind(*range(number))
    for position in range(3):
        client.step(*[(i, position, x[i, position : position + 1]) for i in range(number)])
    client.step((1, 3, x[1, 3:5]))
    client.control("detach", handles=[0])
    for served in any_server.server.streams:
        any_server.uvicorn.loop.call_soon_threadsafe(served.drain)
    goodbyes = goodbyes_of(client)
    expected = {i: {"handle": i, "session_id": ids[i], "position": 5 if i == 1 else 3} for i in range(1, number)}
    assert goodbyes == expected
    other = dial(running=any_server)
    other.open(*[{"handle": i, "session_id": each["session_id"], "mode": "resume"} for i, each in goodbyes.items()])
    went_on = other.step(*[(i, each["position"], x[i, each["position"] :]) for i, each in goodbyes.items()])
    for i in (1, 2, number - 1):
        assert np.array_equal(went_on[i].outputs[0], oracle("lstm")(x[i])[expected[i]["position"] :])


@pytest.mark.parametrize("kind", [Running, Plain])
def test_goodbyes_follow_every_answer(
    repository: Path, dial: Dial, background: Background, kind: type[Running], x: np.ndarray
):
    """Whatever the client still sends, it has the outputs of exactly the steps reported as applied."""
    running = kind(Settings(repository=repository))
    client = dial(running=running)
    client.bind(0, 1, depth=64)

    def flood() -> None:
        with suppress(ConnectionClosed):
            while True:
                client.socket.send(frame((0, None, x), (1, None, x[:1])))

    flooding = background(flood)
    client.receive(100)
    for served in running.server.streams:
        running.uvicorn.loop.call_soon_threadsafe(served.drain)
    messages = last_messages(client)
    flooding.result(PATIENCE)
    texts = [json.loads(message) for message in messages if isinstance(message, str)]
    assert {text.get("code", "closing") for text in texts} <= {"closing", "queue_full"}
    assert texts[-1]["op"] == "closing"
    reached = {r.handle: r.position for m in messages if isinstance(m, bytes) for r in replies(client.manifest, m)}
    assert {item["handle"]: item["position"] for item in texts[-1]["sessions"]} == reached
    running.stop()


def test_goodbyes_at_shutdown(serve: Serve, dial: Dial, x: np.ndarray):
    running = serve()
    client = dial(running=running)
    (session_id,) = client.bind(0)
    client.bind(1)
    client.step((0, 0, x))
    running.stop()
    goodbyes = goodbyes_of(client)
    assert goodbyes[0] == {"handle": 0, "session_id": session_id, "position": len(x)}
    assert goodbyes[1]["position"] == 0
    assert not running.server.streams


def test_goodbyes_name_the_error_of_a_closed_session(serve: Serve, dial: Dial):
    running = serve()
    client = dial(running=running)
    (session_id,) = client.bind(0)
    httpx.delete(f"{running.url}/v1/models/lstm/sessions/{session_id}").raise_for_status()
    running.stop()
    goodbyes = goodbyes_of(client)
    assert goodbyes[0]["error"]["code"] == "session_closed"


async def test_a_drain_waits_for_running_chunks(wire: Wire):
    await wire.bind(GOODBYES + 1)
    wire.frame(range(GOODBYES + 1))
    await reached(wire.engine.reached.is_set)
    wire.connection.drain()
    wire.connection.drain()
    assert wire.flow == ["pause"]
    assert not wire.sent
    wire.engine.release()
    await reached(lambda: {"op": "hung up", "code": 1012} in wire.sent)
    assert len(wire.answered()) == GOODBYES + 1
    texts = [message for message in wire.sent if isinstance(message, dict)]
    assert [text["op"] for text in texts] == ["closing", "closing", "hung up"]
    assert [item["position"] for text in texts[:-1] for item in text["sessions"]] == [1] * (GOODBYES + 1)
    wire.frame(range(1))  # it was in flight
    wire.connection.on_text(b"{}")
    assert wire.sent[-1] == texts[-1]
    assert wire.flow == ["pause"]


async def test_a_drain_while_sessions_are_opened(wire: Wire):
    """Sessions opened so far can be resumed; the rest get `draining`, as do later messages."""
    wanted = [{"handle": handle} for handle in range(SLICE + 1)]
    wire.connection.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    wire.connection.on_text(json.dumps({"op": "open", "sessions": [{"handle": 999}]}).encode())
    wire.frame(range(1))
    wire.server.drain()
    wire.connection.drain()
    wire.engine.release()
    await reached(lambda: {"op": "hung up", "code": 1012} in wire.sent)
    first, second, *closing, _ = [message for message in wire.sent if isinstance(message, dict)]
    assert [item.get("error", {}).get("code") for item in first["sessions"]] == [None] * SLICE + ["draining"]
    assert second["sessions"][0]["error"]["code"] == "draining"
    assert [reply.handle for reply in wire.answered()] == [0]
    assert [item["position"] for text in closing for item in text["sessions"]] == [1] + [0] * (SLICE - 1)
