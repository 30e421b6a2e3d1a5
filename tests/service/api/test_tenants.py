"""Authorization: every route of the OpenAPI document, every scope, two tenants, every transport.

A new route without a rule here fails `test_every_route_has_a_rule`.
"""

import asyncio
import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import wire
from raw_http import Wire, request
from serving import Running, raw_steps
from waiting import PATIENCE
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from unroll.service.access.keys import new_key
from unroll.service.settings import Settings

X = np.random.default_rng(3).standard_normal((6, 3)).astype(np.float32)

MAP = {"kind": "columns", "columns": [{"future": [0.5]}] * 3}
PUBLIC = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
#: All other routes need `infer`.
OTHER_SCOPES = {
    "/metrics": "metrics",
    "/v2/models/stats": "metrics",
    "/v2/models/{model}/stats": "metrics",
    "/v2/models/{model}/versions/{version}/stats": "metrics",
    "/v1/admin/sessions": "sessions:admin",
    "/v1/admin/drain": "server:admin",
    "/v1/admin/log-level": "server:admin",
    "/v2/repository/models/{model}/load": "models:admin",
    "/v2/repository/models/{model}/unload": "models:admin",
}
#: Routes of one session, with a request that changes state where possible.
SESSION_ROUTES = {
    ("get", "/v1/models/{model}/sessions/{session_id}"),
    ("delete", "/v1/models/{model}/sessions/{session_id}"),
    ("post", "/v1/models/{model}/sessions/{session_id}/fork"),
    ("post", "/v1/models/{model}/sessions/{session_id}/steps"),
    ("get", "/v1/models/{model}/sessions/{session_id}/state"),
    ("post", "/v1/models/{model}/sessions/{session_id}/rollout"),
    ("put", "/v1/models/{model}/sessions/{session_id}/state"),
}
#: Routes without a session in the path.
OTHER_ROUTES = {
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/models/{model}/sequences"),
    ("post", "/v1/models/{model}/sessions"),
    ("post", "/v1/tickets"),
    ("get", "/v1/admin/sessions"),
    ("post", "/v1/admin/drain"),
    ("put", "/v1/admin/log-level"),
    ("get", "/v2"),
    ("get", "/v2/health/live"),
    ("get", "/v2/health/ready"),
    ("get", "/v2/models/{model}"),
    ("get", "/v2/models/{model}/config"),
    ("get", "/v2/models/{model}/ready"),
    ("get", "/v2/models/{model}/stats"),
    ("get", "/v2/models/{model}/versions/{version}"),
    ("get", "/v2/models/{model}/versions/{version}/config"),
    ("get", "/v2/models/{model}/versions/{version}/ready"),
    ("get", "/v2/models/{model}/versions/{version}/stats"),
    ("get", "/v2/models/stats"),
    ("post", "/v2/models/{model}/infer"),
    ("post", "/v2/models/{model}/versions/{version}/infer"),
    ("post", "/v2/repository/index"),
    ("post", "/v2/repository/models/{model}/load"),
    ("post", "/v2/repository/models/{model}/unload"),
}


class Keyed:
    """A server with the tenants `acme` and `other`, and an `acme` key per scope."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.secrets: dict[str, str] = {}
        entries = []
        for name, tenant, scope in [
            ("acme", "acme", "infer"),
            ("other", "other", "infer"),
            ("metrics", "acme", "metrics"),
            ("admin", "acme", "sessions:admin"),
            ("models", "acme", "models:admin"),
            ("server", "acme", "server:admin"),
            ("admin of other", "other", "sessions:admin"),
        ]:
            self.secrets[name], entry = new_key(name, tenant, [scope])
            entries.append(entry)
        path = folder / "keys.toml"
        path.write_text("\n".join(entries))
        settings = {"repository": repository, "keys": path, "admin": True, "snapshot_keys": ["k" * 16]}
        self.running = Running(Settings.model_validate(settings))
        self.clients = {name: self.client({"Authorization": f"Bearer {key}"}) for name, key in self.secrets.items()}
        self.nobody = self.client({})

    def client(self, headers: dict[str, str]) -> httpx.Client:
        return httpx.Client(base_url=self.running.url, headers=headers)

    def open(self, tenant: str, session_id: str) -> str:
        opened = self.clients[tenant].post("/v1/models/gru/sessions", json={"session_id": session_id})
        assert opened.status_code == 201, opened.text
        assert opened.json()["session_id"] == session_id
        return f"/v1/models/gru/sessions/{session_id}"

    def step(self, tenant: str, path: str, x: np.ndarray) -> bytes:
        answer = self.clients[tenant].post(f"{path}/steps", content=x.tobytes(), headers=raw_steps(x))
        assert answer.status_code == 200, answer.text
        return answer.content

    def stream(self, name: str | None) -> ClientConnection:
        headers = {} if name is None else {"X-API-Key": self.secrets[name]}
        return connect(self.running.url.replace("http", "ws") + "/v1/models/gru/stream", additional_headers=headers)

    def stop(self) -> None:
        for client in (*self.clients.values(), self.nobody):
            client.close()
        self.running.stop()


@pytest.fixture(scope="module")
def keyed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    keyed = Keyed(few, tmp_path_factory.mktemp("keys"))
    yield keyed
    keyed.stop()


def send(client: httpx.Client, method: str, template: str, session_id: str = "none") -> httpx.Response:
    """Send a request that succeeds if the session exists and the key is valid."""
    path = template.format(model="gru", version="1", session_id=session_id)
    if template.endswith(("/steps", "/sequences")):
        return client.request(method, path, content=X[:1].tobytes(), headers=raw_steps(X[:1]))
    if template.endswith("/infer"):
        made = wire.body({"x": X[np.newaxis, :1]}, sequence_id=session_id, sequence_start=True)
        return client.request(method, path, content=made.content, headers=made.headers)
    if (method, template[-6:]) == ("put", "/state"):
        content, headers = b"no snapshot", {"Content-Type": "application/octet-stream"}
        return client.request(method, path, content=content, headers=headers)
    if template.endswith(("load", "/drain", "/log-level")):  # authenticated, but refused for the action
        return client.request(method, path, json={"unknown": 1})
    if template.endswith("/rollout"):
        return client.request(method, path, json={"steps": 1, "map": MAP, "inputs": {"x": X[:1].tolist()}})
    return client.request(method, path)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


def test_every_route_has_a_rule(keyed: Keyed) -> None:
    document = keyed.nobody.get("/openapi.json").json()
    routes = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert routes == SESSION_ROUTES | OTHER_ROUTES


@pytest.mark.parametrize(("method", "template"), sorted(SESSION_ROUTES | OTHER_ROUTES))
def test_the_scope_of_every_route(keyed: Keyed, method: str, template: str) -> None:
    if template in PUBLIC:
        assert send(keyed.nobody, method, template).status_code == 200
        return
    answer = send(keyed.nobody, method, template)
    assert code(answer) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"
    with keyed.client({"Authorization": f"Bearer {keyed.secrets['acme']}x"}) as stranger:
        assert code(send(stranger, method, template)) == (401, "unauthenticated")
    needed = OTHER_SCOPES.get(template, "infer")
    scopes = {"acme": "infer", "metrics": "metrics", "admin": "sessions:admin"}
    for name, scope in (scopes | {"models": "models:admin", "server": "server:admin"}).items():
        answer = send(keyed.clients[name], method, template)
        if scope == needed:
            assert answer.status_code not in (401, 403), answer.text
        else:
            assert code(answer) == (403, "forbidden")
    if template.endswith("/infer"):
        keyed.clients["acme"].delete("/v1/models/gru/sessions/none").raise_for_status()


#: Requests that contain a valid key where the server does not look, or in another form: path and headers.
MISPLACED = {
    "Bearer and a tab": ("", "Authorization: Bearer\t{key}"),
    "no scheme": ("", "Authorization: {key}"),
    "another scheme": ("", "Authorization: Token {key}"),
    "in quotes": ("", 'Authorization: Bearer "{key}"'),
    "Bearer in the other header": ("", "X-API-Key: Bearer {key}"),
    "a list": ("", "X-API-Key: {key},{key}"),
    "longer": ("", "X-API-Key: {key}A"),
    "its digest": ("", "X-API-Key: {digest}"),
    "behind a wrong one": ("", "X-API-Key: none\r\nAuthorization: Bearer {key}"),
    "behind an empty one": ("", "X-API-Key:\r\nAuthorization: Bearer {key}"),
    "a cookie": ("", "Cookie: X-API-Key={key}"),
    "for a proxy": ("", "Proxy-Authorization: Bearer {key}"),
    "in the query": ("?api_key={key}&access_token={key}", "Accept: */*"),
    "a ticket": ("", "Authorization: Bearer {ticket}"),
    "a ticket as a protocol": ("", "Sec-WebSocket-Protocol: unroll.ticket.{ticket}"),
    "a name of another proxy": ("", "X-Forwarded-User: acme"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_misplaced_key_admits_nobody(keyed: Keyed, name: str) -> None:
    key, ticket = keyed.secrets["acme"], keyed.clients["acme"].post("/v1/tickets").json()["ticket"]
    words = {"key": key, "digest": hashlib.sha256(key.encode()).hexdigest(), "ticket": ticket}
    query, headers = (text.format(**words) for text in MISPLACED[name])
    wire = Wire(keyed.running.port)
    with closing(wire.socket):
        wire.send(f"GET /v1/models{query} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n".encode())
        status, _, body = wire.answer()
    assert status == 401, body


def test_each_request_of_a_connection_has_its_own_key(keyed: Keyed) -> None:
    """The head of a step that a connection repeats is not parsed again, and its key may be another one."""
    path, key = keyed.open("acme", "one connection"), keyed.secrets["acme"]
    step = partial(request, f"{path}/steps".replace(" ", "%20"), X[:1].tobytes())
    own, none = step(f"X-API-Key: {key}"), step()
    stranger, other = step(f"X-API-Key: {key[:-1]}-"), step(f"X-API-Key: {keyed.secrets['other']}")
    page = step(f"X-API-Key: {key}", "Origin: http://other.example")
    wire = Wire(keyed.running.port)
    with closing(wire.socket):
        for sent, expected in ((own, 200), (own, 200), (stranger, 401), (own, 200), (other, 404), (page, 403)):
            wire.send(sent)
            assert wire.answer()[0] == expected
        wire.send(own + none + own)
        assert [wire.answer()[0] for _ in range(3)] == [200, 401, 200]
    assert keyed.clients["acme"].delete(path).json()["position"] == 5


def test_models_are_loaded_by_post_only(keyed: Keyed) -> None:
    assert keyed.clients["models"].get("/v2/repository/models/gru/load").status_code == 405


def test_paths_that_do_not_exist_need_a_key_too(keyed: Keyed) -> None:
    for path in ("/v1/none", "/v2/none", "/livez/none", "/v1/models/"):
        assert keyed.nobody.get(path).status_code == 401, path
        assert keyed.clients["acme"].get(path).status_code in (404, 405), path
    for page in ("/", "/docs", "/openapi.json"):
        assert keyed.nobody.get(page).status_code == 200


@pytest.mark.parametrize(("method", "template"), sorted(route for route in OTHER_ROUTES if route[1] in OTHER_SCOPES))
@pytest.mark.parametrize("ending", ["%0a", "%0A%0a", "%0d", "/", "%2f", ";", "%00", "%20"])
def test_no_ending_of_a_path_gets_around_its_scope(keyed: Keyed, method: str, template: str, ending: str) -> None:
    path = template.format(model="gru", version="1") + ending
    for client in keyed.clients.values():
        assert client.request(method, path).status_code in (403, 404, 405), path


@pytest.mark.parametrize(("method", "template"), sorted(SESSION_ROUTES))
def test_session_of_another_tenant_looks_nonexistent(keyed: Keyed, method: str, template: str) -> None:
    path = keyed.open("acme", "secret")
    try:
        keyed.step("acme", path, X[:3])
        found = send(keyed.clients["other"], method, template, "secret")
        never = send(keyed.clients["other"], method, template, "always")
        assert code(found) == (404, "session_unknown")
        assert found.text.replace("secret", "always") == never.text
        assert found.headers.keys() == never.headers.keys()
        assert keyed.clients["acme"].get(path).json()["position"] == 3
    finally:
        keyed.clients["acme"].delete(path)
    if method != "post" or not template.endswith("/fork"):  # also after the session ends
        assert code(send(keyed.clients["other"], method, template, "secret")) == (404, "session_unknown")


def test_session_count_covers_only_the_tenants_own(keyed: Keyed) -> None:
    def counts(tenant: str) -> tuple[int, int]:
        listed = {model["name"]: model for model in keyed.clients[tenant].get("/v1/models").json()}
        return keyed.clients[tenant].get("/v1/models/gru").json()["sessions"], listed["gru"]["sessions"]

    before = counts("other")
    path = keyed.open("acme", "uncounted")
    assert counts("other") == before
    mine = counts("acme")
    assert min(mine) > 0
    keyed.clients["acme"].delete(path).raise_for_status()
    assert counts("acme") == (mine[0] - 1, mine[1] - 1)


def test_sessions_of_one_id_are_two(keyed: Keyed) -> None:
    mine, theirs = keyed.open("acme", "same"), keyed.open("other", "same")
    whole = keyed.clients["acme"].post("/v1/models/gru/sequences", content=X.tobytes(), headers=raw_steps(X)).content
    backwards = X[::-1].copy()
    outputs, others = [], []
    for i in range(len(X)):
        outputs.append(keyed.step("acme", mine, X[i : i + 1]))
        others.append(keyed.step("other", theirs, backwards[i : i + 1]))
    assert b"".join(outputs) == whole
    assert b"".join(others) != whole
    keyed.clients["other"].delete(theirs).raise_for_status()
    assert keyed.clients["acme"].get(mine).json()["position"] == len(X)
    assert code(keyed.clients["other"].get(theirs)) == (410, "session_closed")
    keyed.clients["acme"].delete(mine).raise_for_status()


def test_sequences_of_the_open_inference_protocol_are_a_tenants(keyed: Keyed) -> None:
    def infer(tenant: str, x: np.ndarray, **parameters: object) -> httpx.Response:
        made = wire.body({"x": x[np.newaxis]}, sequence_id=7, **parameters)
        return keyed.clients[tenant].post("/v2/models/gru/infer", content=made.content, headers=made.headers)

    first = wire.outputs(infer("acme", X[:2], sequence_start=True))[1]["y"]
    refused = infer("other", X[2:4])
    assert refused.status_code == 400
    assert "sequence" in refused.json()["error"]
    assert "acme" not in refused.text
    wire.outputs(infer("other", X[2:4], sequence_start=True, sequence_end=True))
    rest = wire.outputs(infer("acme", X[2:], sequence_end=True))[1]["y"]
    whole = keyed.clients["acme"].post("/v1/models/gru/sequences", content=X.tobytes(), headers=raw_steps(X)).content
    assert np.concatenate([first[0], rest[0]]).tobytes() == whole


def test_a_fork_and_a_random_id_are_the_tenants(keyed: Keyed) -> None:
    path = keyed.open("acme", "origin")
    for body in ({}, {"session_id": "copy"}):
        forked = keyed.clients["acme"].post(f"{path}/fork", json=body).json()["session_id"]
        assert "\x1d" not in forked
        assert keyed.clients["other"].get(f"/v1/models/gru/sessions/{forked}").status_code == 404
        keyed.clients["acme"].delete(f"/v1/models/gru/sessions/{forked}").raise_for_status()
    opened = keyed.clients["acme"].post("/v1/models/gru/sessions").json()["session_id"]
    assert keyed.clients["other"].get(f"/v1/models/gru/sessions/{opened}").status_code == 404
    assert keyed.clients["acme"].delete(f"/v1/models/gru/sessions/{opened}").status_code == 200
    keyed.clients["acme"].delete(path)


def test_client_held_state_belongs_to_its_tenant(keyed: Keyed) -> None:
    held = keyed.clients["acme"].post("/v1/models/gru/sessions", json={"session_id": "held", "durability": "client"})
    snapshot = held.json()["snapshot"]
    assert held.json()["session_id"] == "held"
    body = {"inputs": {"x": X[:1].tolist()}, "snapshot": snapshot}
    answer = keyed.clients["other"].post("/v1/models/gru/sessions/held/steps", json=body)
    assert code(answer) == (422, "snapshot_invalid")
    answer = keyed.clients["acme"].post("/v1/models/gru/sessions/held/steps", json=body)
    assert answer.status_code == 200, answer.text


def test_an_id_that_looks_like_a_tenants_is_refused(keyed: Keyed) -> None:
    keyed.open("acme", "target")
    for tenant in ("other", "acme"):
        for path in ("%1Dacme%1Dtarget", "%1D%1Dtarget", "%1D"):
            answer = keyed.clients[tenant].get(f"/v1/models/gru/sessions/{path}")
            assert code(answer) == (400, "malformed_request")
    answer = keyed.clients["other"].post("/v1/models/gru/sessions", json={"session_id": "\x1dacme\x1dtarget"})
    assert code(answer) == (400, "malformed_request")
    keyed.clients["acme"].delete("/v1/models/gru/sessions/target").raise_for_status()


def test_streams(keyed: Keyed) -> None:
    for name, status in ((None, 401), ("metrics", 403)):
        with pytest.raises(InvalidStatus) as refused:
            keyed.stream(name)
        assert refused.value.response.status_code == status
    path = keyed.open("acme", "streamed")
    with keyed.stream("acme") as mine, keyed.stream("other") as theirs:
        resume = json.dumps({"op": "open", "sessions": [{"handle": 1, "session_id": "streamed", "mode": "resume"}]})
        mine.send(resume)
        (opened,) = json.loads(mine.recv())["sessions"]
        assert (opened["session_id"], opened["position"]) == ("streamed", 0)
        theirs.send(resume)
        (refused_entry,) = json.loads(theirs.recv())["sessions"]
        assert refused_entry["error"]["code"] == "session_unknown"
        assert "acme" not in str(refused_entry)
        theirs.send(json.dumps({"op": "open", "sessions": [{"handle": 1, "session_id": "streamed"}, {"handle": 2}]}))
        opened = json.loads(theirs.recv())["sessions"]
        assert opened[0]["session_id"] == "streamed"
        assert "\x1d" not in opened[1]["session_id"]
        theirs.send(json.dumps({"op": "close", "handles": [1, 2]}))
        json.loads(theirs.recv())
    assert keyed.clients["acme"].delete(path).status_code == 200


def test_a_ticket_opens_a_stream_in_place_of_the_key(keyed: Keyed) -> None:
    url = keyed.running.url.replace("http", "ws") + "/v1/models/gru/stream"
    ticket = keyed.clients["acme"].post("/v1/tickets").json()
    assert ticket["seconds"] == 30
    with connect(url, subprotocols=["unroll.v1", f"unroll.ticket.{ticket['ticket']}"]) as stream:  # type: ignore[list-item]
        assert stream.subprotocol == "unroll.v1"
        stream.send(json.dumps({"op": "open", "sessions": [{"handle": 1, "session_id": "by ticket"}]}))
        stream.recv()
    assert keyed.clients["acme"].delete("/v1/models/gru/sessions/by%20ticket").status_code == 200
    for protocol in ("unroll.ticket.", "unroll.ticket.AAAA", "unroll.v1"):
        with pytest.raises(InvalidStatus) as refused:
            connect(url, subprotocols=[protocol])  # type: ignore[list-item]
        assert refused.value.response.status_code == 401
    assert code(keyed.nobody.post("/v1/tickets")) == (401, "unauthenticated")


def test_removed_key_ends_its_streams_and_is_refused_on_open_connections(few: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    (leaked, first), (kept, second) = new_key("leaked", "acme", ["infer"]), new_key("kept", "acme", ["infer"])
    path.write_text(first + second)
    running = Running(Settings.model_validate({"repository": few, "keys": path}))
    url = running.url.replace("http", "ws") + "/v1/models/gru/stream"
    connection, opened = Wire(running.port), "/v1/models/gru/sessions/opened"
    with connect(url, additional_headers={"X-API-Key": leaked}) as stream, closing(connection.socket):
        asked = {"headers": {"X-API-Key": leaked}, "json": {"session_id": "opened"}}
        assert httpx.post(f"{running.url}/v1/models/gru/sessions", **asked).status_code == 201
        for position in ("1", "2", "3"):
            connection.send(request(f"{opened}/steps", X[0].tobytes(), f"X-API-Key: {leaked}"))
            assert connection.answer()[1]["unroll-position"] == position
        path.write_text(second)
        running.uvicorn.loop.call_soon_threadsafe(running.server.gate.request_reload)
        with pytest.raises(ConnectionClosed) as closed:
            stream.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        connection.send(request(f"{opened}/steps", X[0].tobytes(), f"X-API-Key: {leaked}"))
        assert connection.answer()[0] == 401
    with pytest.raises(InvalidStatus) as refused:
        connect(url, additional_headers={"X-API-Key": leaked})
    assert refused.value.response.status_code == 401
    with connect(url, additional_headers={"X-API-Key": kept}):
        pass
    running.stop()


def test_an_operator_sees_its_tenant_only(keyed: Keyed) -> None:
    mine, theirs = keyed.open("acme", "listed"), keyed.open("other", "unlisted")
    for name, expected in (("admin", "listed"), ("admin of other", "unlisted")):
        listed = keyed.clients[name].get("/v1/admin/sessions", params={"limit": 1000}).json()["sessions"]
        assert expected in {found["session_id"] for found in listed}
        assert {"listed", "unlisted"} & {found["session_id"] for found in listed} == {expected}
        assert "\x1d" not in str(listed)
    keyed.clients["acme"].delete(mine)
    keyed.clients["other"].delete(theirs)


def test_the_pages_of_an_operator_say_nothing_of_other_tenants(keyed: Keyed) -> None:
    paths = [(tenant, keyed.open(tenant, f"page-{i}")) for tenant in ("acme", "other") for i in range(25)]
    found, after = set(), ""
    while after is not None:
        params = {"limit": 1, "after": after}
        page = keyed.clients["admin of other"].get("/v1/admin/sessions", params=params).json()
        assert "acme" not in str(page)
        found |= {session["session_id"] for session in page["sessions"]}
        after = page["after"]
    assert found == {f"page-{i}" for i in range(25)}
    for tenant, path in paths:
        keyed.clients[tenant].delete(path).raise_for_status()


def test_without_keys_a_ticket_is_not_needed(client: httpx.Client) -> None:
    assert client.post("/v1/tickets").status_code == 404


def test_a_page_of_another_origin_can_change_nothing(server: Running, client: httpx.Client) -> None:
    opened = client.post("/v1/models/gru/sessions").json()["session_id"]
    path = f"/v1/models/gru/sessions/{opened}"
    made = wire.body({"x": X[np.newaxis]}, binary=False, sequence_id=5, sequence_start=True)
    evil = {"Origin": "https://evil.example"}
    for answer in (
        client.post("/v1/models/gru/sessions", headers=evil),
        client.post(f"{path}/fork", headers=evil),
        client.post(f"{path}/steps", content=X[:1].tobytes(), headers=raw_steps(X[:1]) | evil),
        client.post("/v2/models/gru/infer", content=made.content, headers={"Content-Type": "text/plain"} | evil),
        client.post("/v2/models/gru/infer", content=made.content, headers={"Origin": "null"}),
    ):
        assert code(answer) == (403, "origin_refused")
    own = {"Origin": server.url}
    assert client.post(f"{path}/steps", content=X[:1].tobytes(), headers=raw_steps(X[:1]) | own).status_code == 200
    assert client.delete(path, headers=own).json()["position"] == 1


def test_foreign_host_name_is_refused(server: Running, client: httpx.Client) -> None:
    """The page's origin then equals the server's own; only the host name reveals the attack."""
    evil = {"Host": f"evil.example:{server.port}", "Origin": f"http://evil.example:{server.port}"}
    for answer in (
        client.post("/v1/models/gru/sessions", headers=evil),
        client.post("/v1/models/gru/sequences", content=X.tobytes(), headers=raw_steps(X) | evil),
        client.get("/v1/models", headers=evil),
        client.get("/readyz", headers=evil),
    ):
        assert code(answer) == (403, "host_refused")
    with pytest.raises(InvalidStatus) as refused:
        connect(
            f"ws://evil.example:{server.port}/v1/models/gru/stream",
            sock=socket.create_connection(("127.0.0.1", server.port)),
            origin=f"http://evil.example:{server.port}",  # type: ignore[arg-type]
        )
    assert refused.value.response.status_code == 403


async def test_concurrent_clients_of_two_tenants_never_mix(keyed: Keyed) -> None:
    """Twenty sessions of each tenant, with the same ids."""
    rng = np.random.default_rng(5)
    inputs = {(t, i): rng.standard_normal((8, 3)).astype(np.float32) for t in ("acme", "other") for i in range(20)}
    oracle = {
        who: keyed.clients["acme"].post("/v1/models/gru/sequences", content=x.tobytes(), headers=raw_steps(x)).content
        for who, x in inputs.items()
    }

    async def run(tenant: str, i: int) -> bytes:
        async with httpx.AsyncClient(
            base_url=keyed.running.url, headers={"X-API-Key": keyed.secrets[tenant]}
        ) as client:
            path, parts = f"/v1/models/gru/sessions/crowd-{i}", []
            await client.post("/v1/models/gru/sessions", json={"session_id": f"crowd-{i}"})
            for x in inputs[tenant, i]:
                answer = await client.post(f"{path}/steps", content=x.tobytes(), headers=raw_steps(x[np.newaxis]))
                parts.append(answer.content)
            await client.delete(path)
        return b"".join(parts)

    found = await asyncio.gather(*(run(*who) for who in inputs))
    assert dict(zip(inputs, found, strict=True)) == oracle
