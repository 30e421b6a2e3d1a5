"""Quotas: limits on a tenant's sessions, streams and steps; no tenant takes another's place."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import wire
from client_frames import BINARY, CLOSE, masked
from raw_http import Wire, request
from serving import Running, raw_steps
from waiting import until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from unroll.service.access.keys import new_key
from unroll.service.settings import Settings

X = np.random.default_rng(3).standard_normal((6, 3)).astype(np.float32)
MAP = {"kind": "columns", "columns": [{"future": [0.5]}] * 3}


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


Limited = Callable[..., tuple[Running, dict[str, httpx.Client]]]


@pytest.fixture
def limited(few: Path, tmp_path: Path) -> Iterator[Limited]:
    """`limited(quotas, **settings)`: a server with these quotas, and a client per tenant."""
    with ExitStack() as at_end:
        yield partial(_limited, few, tmp_path, at_end)


def _limited(
    few: Path, folder: Path, at_end: ExitStack, text: str, **settings: object
) -> tuple[Running, dict[str, httpx.Client]]:
    keys = {tenant: new_key(tenant, tenant, ["infer"]) for tenant in ("acme", "other")}
    path = folder / "keys.toml"
    path.write_text("\n".join(entry for _, entry in keys.values()) + text)
    running = Running(Settings.model_validate({"repository": few, "keys": path, **settings}))
    at_end.callback(running.stop)
    clients = {
        tenant: at_end.enter_context(httpx.Client(base_url=running.url, headers={"X-API-Key": secret}))
        for tenant, (secret, _) in keys.items()
    }
    return running, clients


@pytest.mark.parametrize("spill_bytes", [0, 2000])
def test_no_tenant_evicts_the_session_of_another(limited: Limited, spill_bytes: int) -> None:
    clients = limited("", session_capacity=4, spill_bytes=spill_bytes)[1]
    whole = clients["acme"].post("/v1/models/gru/sequences", content=X.tobytes(), headers=raw_steps(X)).content
    path = "/v1/models/gru/sessions/calm"
    clients["acme"].post("/v1/models/gru/sessions", json={"session_id": "calm"}).raise_for_status()
    parts = [clients["acme"].post(f"{path}/steps", content=X[:3].tobytes(), headers=raw_steps(X[:3])).content]
    for i in range(100):
        opened = clients["other"].post("/v1/models/gru/sessions", json={"session_id": f"flood-{i}"})
        assert opened.status_code == 201, opened.text
    parts.append(clients["acme"].post(f"{path}/steps", content=X[3:].tobytes(), headers=raw_steps(X[3:])).content)
    assert b"".join(parts) == whole
    assert code(clients["other"].get("/v1/models/gru/sessions/flood-0")) == (410, "session_evicted")
    for i in range(4):  # a tenant's own sessions make room for each other
        assert clients["acme"].post("/v1/models/gru/sessions", json={"session_id": f"own-{i}"}).status_code in (
            201,
            503,
        )


def test_the_number_of_sessions_of_a_tenant(limited: Limited) -> None:
    quota = "\n[tenants.acme]\nsessions = 3\n"
    running, clients = limited(quota, session_capacity=2)
    for i in range(3):  # one session is in host memory
        clients["acme"].post("/v1/models/gru/sessions", json={"session_id": f"s{i}"}).raise_for_status()
    made = wire.body({"x": X[np.newaxis]}, sequence_id=9, sequence_start=True)
    headers = {"X-API-Key": clients["acme"].headers["x-api-key"]}
    with connect(running.url.replace("http", "ws") + "/v1/models/gru/stream", additional_headers=headers) as stream:
        stream.send(
            json.dumps({"op": "open", "sessions": [{"handle": 1}, {"handle": 2, "session_id": "s0", "mode": "resume"}]})
        )
        opened = json.loads(stream.recv())["sessions"]
        assert opened[0]["error"]["code"] == "quota_exceeded"
        assert opened[1]["position"] == 0
    for answer in (
        clients["acme"].post("/v1/models/gru/sessions"),
        clients["acme"].post("/v1/models/lstm/sessions"),
        clients["acme"].post("/v1/models/gru/sessions/s1/fork"),
        clients["acme"].post("/v2/models/gru/infer", content=made.content, headers=made.headers),
    ):
        assert code(answer) == (429, "quota_exceeded"), answer.text
        assert answer.headers["retry-after"] == "1"
    clients["other"].post("/v1/models/gru/sessions").raise_for_status()
    clients["acme"].delete("/v1/models/gru/sessions/s0").raise_for_status()
    clients["acme"].post("/v1/models/gru/sessions").raise_for_status()


def test_the_number_of_streams_of_a_tenant(limited: Limited) -> None:
    running, clients = limited("\n[tenants.acme]\nstreams = 1\n")
    url = running.url.replace("http", "ws") + "/v1/models/gru/stream"
    headers = {tenant: {"X-API-Key": client.headers["x-api-key"]} for tenant, client in clients.items()}
    with connect(url, additional_headers=headers["acme"]), connect(url, additional_headers=headers["other"]):
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers=headers["acme"])
        assert refused.value.response.status_code == 429


def test_the_steps_of_a_tenant(limited: Limited) -> None:
    running, clients = limited("\n[tenants.acme]\nsteps_per_second = 0.01\n")
    path = clients["acme"].post("/v1/models/gru/sessions").json()["session_id"]
    steps = {"content": X[:1].tobytes(), "headers": raw_steps(X[:1])}
    url = f"/v1/models/gru/sessions/{path}/steps"
    assert clients["acme"].post(url, **steps).status_code == 200
    made = wire.body({"x": X[np.newaxis]}, sequence_id=9, sequence_start=True)
    for answer in (
        clients["acme"].post(url, **steps),
        clients["acme"].post("/v1/models/gru/sequences", **steps),
        clients["acme"].post("/v2/models/gru/infer", content=made.content, headers=made.headers),
    ):
        assert code(answer) == (429, "quota_exceeded")
    headers = {"X-API-Key": clients["acme"].headers["x-api-key"]}
    with connect(running.url.replace("http", "ws") + "/v1/models/gru/stream", additional_headers=headers) as stream:
        stream.send(json.dumps({"op": "open", "sessions": [{"handle": 1, "session_id": path, "mode": "resume"}]}))
        stream.recv()
        stream.send(json.dumps({"op": "steps", "handle": 1, "inputs": {"x": X[:1].tolist()}}))
        assert json.loads(stream.recv())["code"] == "quota_exceeded"
    mapped = {"steps": 1, "map": MAP, "inputs": {"x": X[:1].tolist()}}
    assert code(clients["acme"].post(url.replace("/steps", "/rollout"), json=mapped)) == (429, "quota_exceeded")
    assert clients["acme"].get(url.removesuffix("/steps")).json()["position"] == 1
    assert clients["other"].post("/v1/models/gru/sequences", **steps).status_code == 200


@contextmanager
def dialled(running: Running) -> Iterator[Wire]:
    wire = Wire(running.port)
    with wire.socket:
        yield wire


def test_the_bytes_that_requests_and_answers_of_a_tenant_hold(limited: Limited) -> None:
    """Covers the bodies of every kind of route, and stream messages."""
    limit, half = 400_000, 250_000
    running, clients = limited(f"\n[tenants.acme]\nbytes = {limit}\n")
    key = f"X-API-Key: {clients['acme'].headers['x-api-key']}"
    upgrade = (
        "GET /v1/models/lstm/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{key}\r\n\r\n"
    )
    begun = masked(BINARY, bytes(half))[:-1]

    def refused(path: str) -> tuple[int, str]:
        with dialled(running) as wire:
            wire.send(request(path, bytes(half), key))
            status, _, body = wire.answer()
            return status, json.loads(body).get("code", "")

    def holds(what: str) -> None:
        until(lambda: running.server.held.of_tenants["acme"] > limit - half, what)
        assert refused("/v1/models/lstm/sequences") == (429, "quota_exceeded")
        for path in ("/v1/models/lstm/sequences", "/v1/models/lstm/sessions"):
            other = clients["other"].post(path, content=bytes(half))
            assert other.status_code != 429, other.text

    for path in ("/v1/models/lstm/sequences", "/v2/models/lstm/infer", "/v1/models/lstm/sessions"):
        with dialled(running) as wire:
            wire.send(request(path, bytes(half), key)[:-half])
            wire.send(bytes(half - 1))
            holds(f"the body of {path}")
        until(lambda: not running.server.held.of_tenants, "the end of the connection")
    with dialled(running) as wire, dialled(running) as second:
        for stream in (wire, second):
            stream.send(upgrade.encode())
            assert stream.head()[0] == 101
        wire.send(begun)
        holds("the message of a stream")
        second.send(begun)
        first, size = second.exactly(2)
        assert (first, int.from_bytes(second.exactly(size)[:2])) == (CLOSE, 1013)
    until(lambda: not running.server.held.of_tenants, "the end of the streams")


def test_answers_that_a_tenant_does_not_read_are_its_own(limited: Limited) -> None:
    """The requests are pipelined, and only the first is being answered."""
    running, clients = limited("\n[tenants.acme]\nbytes = 1_000_000\n")
    key = f"X-API-Key: {clients['acme'].headers['x-api-key']}"
    with dialled(running) as wire:
        asks = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{key}\r\n\r\n".encode()
        wire.send(asks)
        assert wire.answer()[0] == 200
        running.keep_little_for(wire.socket)
        wire.send(asks * 100)
        until(lambda: running.server.held.by_kind["answers"] > 0, "answers that are not read")
        assert running.server.held.of_tenants == {"acme": running.server.held.by_kind["answers"]}
    until(lambda: not running.server.held.of_tenants, "the end of the connection")


def test_a_sequence_that_is_open_survives_a_start_that_the_quota_refuses(limited: Limited) -> None:
    _, clients = limited("\n[tenants.acme]\nsteps_per_second = 0.01\n")
    made = wire.body({"x": X[np.newaxis, :1]}, sequence_id=9, sequence_start=True)
    post = partial(clients["acme"].post, "/v2/models/gru/infer", content=made.content, headers=made.headers)
    assert post().status_code == 200
    assert code(post()) == (429, "quota_exceeded")
    assert clients["acme"].get("/v1/models/gru/sessions/9").json()["position"] == 1


@pytest.mark.parametrize("stored", [False, True])
def test_sessions_that_are_opened_at_once_are_counted_one_by_one(
    limited: Limited, tmp_path: Path, stored: bool, background: Callable[..., Future]
) -> None:
    """Opening with an id waits for the store, and a fork waits for the work before it."""
    store = {"store": f"file://{tmp_path}/store"} if stored else {}
    running, clients = limited("\n[tenants.acme]\nsessions = 3\n", **store)
    client = clients["acme"]
    client.post("/v1/models/gru/sessions", json={"session_id": "s"}).raise_for_status()
    with running.holding("gru") as engine:
        step = background(
            client.post, "/v1/models/gru/sessions/s/steps", content=X[:1].tobytes(), headers=raw_steps(X[:1])
        )
        engine.wait()
        asked = [background(client.post, "/v1/models/gru/sessions/s/fork") for _ in range(8)]
        until(lambda: len(running.uvicorn.server_state.tasks) >= 8, "the forks wait")
    assert step.result().status_code == 200
    assert sorted(fork.result().status_code for fork in asked) == [201] * 2 + [429] * 6
    for fork in asked:
        if fork.result().status_code == 201:
            client.delete(f"/v1/models/gru/sessions/{fork.result().json()['session_id']}").raise_for_status()
    opened = [background(client.post, "/v1/models/gru/sessions", json={"session_id": f"s{i}"}) for i in range(8)]
    assert sorted(answer.result().status_code for answer in opened) == [201] * 2 + [429] * 6


@pytest.mark.parametrize("stored", [False, True])
def test_the_count_of_sessions_does_not_drift(limited: Limited, tmp_path: Path, stored: bool) -> None:
    """Runs random histories of requests that open and end sessions, or fail to."""
    store = {"store": f"file://{tmp_path}/store"} if stored else {}
    quota = "\n[tenants.acme]\nsessions = 6\n"
    running, clients = limited(quota, session_capacity=8, spill_bytes=4000, **store)
    client, rng = clients["acme"], random.Random(5)
    path, statuses = "/v1/models/gru/sessions", Counter[int]()
    key = {"X-API-Key": client.headers["x-api-key"]}
    for _ in range(300):
        name, other = rng.choice("abcdefghij"), rng.choice("abcdefghij")
        start = wire.body({"x": X[np.newaxis]}, sequence_id=name, sequence_start=True, sequence_end=rng.random() < 0.5)
        tried = [
            ("POST", path, {"json": {"session_id": name}}),
            ("POST", path, {"json": {"session_id": name, "state": [1.0]}}),
            ("POST", f"{path}/{name}/fork", {"json": {"session_id": other}}),
            ("DELETE", f"{path}/{name}", {}),
            ("POST", f"{path}/{name}/steps", {"content": X.tobytes(), "headers": raw_steps(X)}),
            ("POST", "/v2/models/gru/infer", {"content": start.content, "headers": start.headers}),
        ]
        method, url, sent = rng.choice(tried)
        answer = clients[rng.choice(("acme", "acme", "acme", "other"))].request(method, url, **sent)
        statuses[answer.status_code] += 1
        if rng.random() < 0.1:
            url = running.url.replace("http", "ws") + "/v1/models/gru/stream"
            with connect(url, additional_headers=key) as stream:
                stream.send(json.dumps({"op": "open", "sessions": [{"handle": 1, "session_id": name}]}))
                if rng.random() < 0.5:
                    stream.recv()
    for name in "abcdefghij":
        client.delete(f"{path}/{name}")
    opened = [client.post(path).status_code for _ in range(7)]
    assert opened == [201] * 6 + [429]
    assert min(statuses[status] for status in (200, 201, 404, 409, 422, 429)) > 0, statuses
