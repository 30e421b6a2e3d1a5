"""Shutdown over HTTP: which requests are refused or finished, and how long it takes. Streams: test_goodbyes.py."""

import json
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
import wire
from raw_http import Wire
from redis_server import RedisServer
from serving import Oracle, Running, Serve, raw_steps
from streams import Client, frame, last_messages, replies
from waiting import until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from unroll.service.transport import server as transport

Background = Callable[..., Future]

X = np.ones((2, 3), "<f4")


def terminate(running: Running) -> None:
    """Do what the SIGTERM handler does."""
    running.uvicorn.handle_exit(signal.SIGTERM, None)


def test_while_load_balancers_notice(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses new sessions and serves everything else; a second signal ends it."""
    monkeypatch.setattr(transport, "_ECHO_SECONDS", 0.0)
    running = serve(drain_delay=1000)
    stream = f"ws://{running.address}/v1/models/lstm/stream"
    with httpx.Client(base_url=running.url) as client, connect(stream) as opened:
        session = f"/v1/models/lstm/sessions/{client.post('/v1/models/lstm/sessions').json()['session_id']}"
        wire.infer(client, "lstm", X, sequence_id=7, sequence_start=True)
        terminate(running)

        for path in ("/readyz", "/v2/health/ready"):
            assert client.get(path).status_code == 503
        assert client.get("/livez").status_code == 200

        for refused in (client.post("/v1/models/lstm/sessions"), client.post(f"{session}/fork")):
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
        start = wire.infer(client, "lstm", X, sequence_id=8, sequence_start=True)
        assert (start.status_code, start.json()["code"]) == (503, "draining")
        for mode in ("new", "resume", "either"):
            wanted = {"handle": 0, "session_id": session.rpartition("/")[2], "mode": mode}
            opened.send(json.dumps({"op": "open", "sessions": [wanted]}))
            assert json.loads(opened.recv())["sessions"][0]["error"]["code"] == "draining"
        with pytest.raises(InvalidStatus) as denied:
            connect(stream).__enter__()
        assert (denied.value.response.status_code, denied.value.response.headers["retry-after"]) == (503, "1")

        for answer in (
            client.post(f"{session}/steps", content=X.tobytes(), headers=raw_steps(X)),
            client.get(session),
            wire.infer(client, "lstm", X, sequence_id=7),
            client.post("/v1/models/lstm/sequences", content=X.tobytes(), headers=raw_steps(X)),
        ):
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
        terminate(running)
        running.stop()


def test_idle_connections_are_closed_and_busy_ones_answered(serve: Serve, background: Background) -> None:
    running = serve()
    idle = Wire(running.port)
    idle.send(b"POST /v1/models/lstm/sessions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")
    session_id = json.loads(idle.answer()[2])["session_id"]
    with httpx.Client(base_url=running.url) as client:
        with running.holding("lstm") as held:
            path = f"/v1/models/lstm/sessions/{session_id}/steps"
            busy = background(client.post, path, content=X.tobytes(), headers=raw_steps(X))
            held.wait()
            terminate(running)
            assert idle.closed()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", running.port))
            assert not busy.done()
        answer = busy.result()
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert answer.headers["unroll-position"] == "2"
    idle.socket.close()
    running.stop()


def test_abandoned_work_is_finished(serve: Serve) -> None:
    running = serve()
    path = f"/v1/models/lstm/sessions/{httpx.post(f'{running.url}/v1/models/lstm/sessions').json()['session_id']}"
    scheduler = running.model("lstm").scheduler
    with running.holding("lstm") as held:
        with socket.create_connection(("127.0.0.1", running.port)) as gone:
            head = f"POST {path}/steps HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
            gone.sendall(f"{head}unroll-steps: {len(X)}\r\ncontent-length: {X.nbytes}\r\n\r\n".encode() + X.tobytes())
            held.wait()
        until(lambda: not running.uvicorn.server_state.connections)
        terminate(running)
        until(lambda: not running.uvicorn.servers[0].is_serving())
        assert scheduler.in_flight == 1
    running.stop()
    assert scheduler.counters.steps == len(X)


def test_slow_client_is_disconnected(serve: Serve) -> None:
    running = serve(drain_timeout=0.1)
    with socket.create_connection(("127.0.0.1", running.port), 20) as slow:
        slow.sendall(b"POST /v1/models/lstm/sequences HTTP/1.1\r\nhost: localhost\r\ncontent-length: 24\r\n\r\n1234")
        until(lambda: any(each.cycle for each in running.uvicorn.server_state.connections))
        running.stop()
        assert slow.recv(65536) == b""


def test_durable_stream_continues_on_another_server(
    serve: Serve, redis_server: RedisServer, oracle: Callable[..., Oracle], rng: np.random.Generator
) -> None:
    """With work in flight: answered steps are committed, and the other replica runs the rest."""
    first, second = serve(store=redis_server.url), serve(store=redis_server.url)
    x = rng.standard_normal((20, 12, 3)).astype("<f4")
    client = Client(first, oracle("lstm").manifest)
    names = client.bind(*range(20), depth=12)
    for t in range(12):
        client.socket.send(frame(*[(i, t, x[i, t : t + 1]) for i in range(20)]))
    client.receive(20)
    terminate(first)
    *outputs, closing = last_messages(client)
    reached = dict.fromkeys(range(20), 1)
    for reply in (reply for message in outputs for reply in replies(client.manifest, message)):
        assert np.array_equal(reply.outputs[0][0], oracle("lstm")(x[reply.handle])[reply.position - 1])
        reached[reply.handle] = reply.position
    told = json.loads(closing)["sessions"]
    assert {item["handle"]: item["session_id"] for item in told} == dict(enumerate(names))
    assert {item["handle"]: item["position"] for item in told} == reached

    other = Client(second, client.manifest)
    opened = other.open(*[{"handle": i, "session_id": name, "mode": "resume"} for i, name in enumerate(names)])
    assert {item["handle"]: item["position"] for item in opened} == reached
    left = [(i, reached[i], x[i, reached[i] :]) for i in range(20) if reached[i] < 12]
    for i, reply in (other.step(*left) if left else {}).items():
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[i])[reached[i] :])
    other.socket.close()
