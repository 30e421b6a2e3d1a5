"""RFC 9110 and 9112: invalid and unsupported requests are refused, and every request is answered."""

from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from raw_http import STEP, Wire, request
from serving import Running

H2C = ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
WEBSOCKET = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
CHUNKS = b"c\r\n" + STEP.tobytes() + b"\r\n0\r\n\r\n"
STREAM = "/v1/models/lstm/stream"


@pytest.fixture
def session(client: httpx.Client) -> Iterator[str]:
    """The path of a session. No refused request may change it."""
    name = client.post("/v1/models/lstm/sessions").raise_for_status().json()["session_id"]
    path = f"/v1/models/lstm/sessions/{name}"
    yield path
    client.delete(path).raise_for_status()


def get(path: str = "/livez", *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    if not any(header.startswith("Host") for header in headers):
        headers = ("Host: localhost", *headers)
    return "\r\n".join([f"{method} {path} HTTP/{version}", *headers, "\r\n"]).encode("latin-1")


def without_host(sent: bytes) -> bytes:
    return sent.replace(b"Host: localhost\r\n", b"")


# ── offers of another protocol ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
def test_a_post_that_offers_another_protocol_is_answered(wire: Wire, session: str, offer: tuple[str, ...]) -> None:
    wire.send(request(f"{session}/steps", STEP.tobytes(), *offer))
    wire.send(request(f"{session}/steps", CHUNKS, *offer, "Transfer-Encoding: chunked"))
    wire.send(request(f"{session}/steps"))
    for position in ("1", "2", "3"):
        status, headers, _ = wire.answer()
        assert (status, headers["unroll-position"]) == (200, position)


@pytest.mark.parametrize("cut", [40, 200, 310])
def test_the_body_behind_an_offer_is_kept_however_it_arrives(wire: Wire, client: httpx.Client, cut: int) -> None:
    body = b'{"session_id": "offered-%d", "static": null}' % cut
    sent = request("/v1/models/lstm/sessions", body, *H2C).replace(b"octet-stream", b"json")
    wire.send(sent[:cut])
    assert client.get("/livez").status_code == 200  # the first part has been read by now
    wire.send(sent[cut:])
    status, _, content = wire.answer()
    assert status == 201
    assert b'"offered-%d"' % cut in content


def test_upgrade_offer_waits_for_the_running_request(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.holding("lstm") as held:
        wire = Wire(running.port)
        wire.send(request("/v1/models/lstm/sequences"), get(STREAM, *WEBSOCKET))
        held.wait()
    assert wire.answer()[0] == 200
    assert wire.answer()[0] == 426
    wire.socket.close()


@pytest.mark.parametrize(
    "sent",
    [
        get(STREAM),
        get(STREAM, *WEBSOCKET, version="1.0"),
        get(STREAM, *WEBSOCKET, "Content-Length: 3") + b"abc",
        get(STREAM, *(line.replace("13", "8") for line in WEBSOCKET)),
    ],
    ids=["plain", "1.0", "body", "version 8"],
)
def test_stream_requires_a_websocket(wire: Wire, sent: bytes) -> None:
    wire.send(sent)
    status, headers, content = wire.answer()
    assert (status, headers["upgrade"], headers["sec-websocket-version"]) == (426, "websocket", "13")
    assert b'"upgrade_required"' in content


def test_a_handshake_with_a_header_that_is_too_long_is_answered(wire: Wire) -> None:
    wire.send(get(STREAM, *WEBSOCKET, "X: " + 9000 * "a"))
    assert wire.head()[0] == 431


# ── requests that are not valid, or not understood ───────────────────────────────────────────────

REFUSED = {
    "two hosts": (get("/livez", "Host: a", "Host: b"), 400),
    "no host": (without_host(get()), 400),
    "no host, short way": (without_host(request("/v1/models/lstm/sequences")), 400),
    "host with a path": (get("/livez", "Host: a/b"), 400),
    "host with a space": (get("/livez", "Host: a b"), 400),
    "gzip, chunked": (request("/v1/models/lstm/sequences", CHUNKS, "Transfer-Encoding: gzip, chunked"), 501),
    "identity": (request("/v1/models/lstm/sequences", STEP.tobytes(), "Transfer-Encoding: identity"), 501),
    "coding and length": (
        request("/v1/models/lstm/sequences", CHUNKS, "transfer-encoding: chunked", "Content-Length: 3"),
        400,
    ),
    "coding of 1.0": (request("/v1/models/lstm/sequences", CHUNKS, "Transfer-Encoding: chunked", version="1.0"), 400),
    "two codings": (request("/livez", CHUNKS, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
    "two lengths": (request("/v1/models/lstm/sequences", STEP.tobytes(), "Content-Length: 3"), 400),
    "negative length": (get("/livez", "Content-Length: -1"), 400),
    "a chunk of no length": (request("/v1/models/lstm/sequences", b"zz\r\n", "Transfer-Encoding: chunked"), 400),
    "0.9": (get(version="0.9"), 505),
    "2.0": (get(version="2.0"), 505),
    "1.2": (get(version="1.2"), 400),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "bare LF": (b"GET /livez HTTP/1.1\nHost: a\n\n", 400),
    "folded header": (get("/livez", "X: a\r\n b"), 400),
    "space before the colon": (get("/livez", "X : a"), 400),
    "NUL": (get("/livez", "X: a\0b"), 400),
    "unknown method": (get(method="BREW"), 501),
    "CONNECT": (get("test:80", method="CONNECT"), 501),
    "URL that is none": (get("http://[/livez"), 400),
    "URL with other letters": (get("/liv\xe9z"), 400),
    "other expectation": (request("/v1/models/lstm/sequences", STEP.tobytes(), "Expect: something"), 417),
    "long URL": (get("/" + 100_000 * "a"), 414),
    "long header": (get("/livez", "X: " + 100_000 * "a"), 431),
    "many headers": (get("/livez", *(5000 * ["X: a"])), 431),
}


@pytest.mark.parametrize(("sent", "status"), REFUSED.values(), ids=REFUSED)
def test_invalid_head_is_refused(wire: Wire, sent: bytes, status: int) -> None:
    wire.send(sent)
    found, headers, content = wire.answer()
    assert (found, headers["connection"]) == (status, "close"), content
    assert b'"code":"' in content


def test_a_head_without_end(wire: Wire, client: httpx.Client) -> None:
    wire.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
    for _ in range(5):
        client.get("/livez")
        wire.send(16_384 * b"a")
    assert wire.answer()[0] == 431


@pytest.mark.parametrize(
    "path", ["/v1/models/lstm/sequences", "/v1/models/lstm/sessions/a/state", "/v2/models/lstm/infer"]
)
def test_a_length_of_thousands_of_digits(wire: Wire, path: str) -> None:
    method = b"PUT" if path.endswith("state") else b"POST"
    sent = request(path, b"", f"Content-Length: {5000 * '0'}12").replace(b"Content-Length: 0\r\n", b"")
    wire.send(sent.replace(b"POST", method, 1) + STEP.tobytes())
    status, _, content = wire.answer()
    assert status == 400
    assert b'"malformed_request"' in content


@pytest.mark.parametrize("path", ["/v1/models/lstm/sequences", "/v1/models/lstm/sessions"])
def test_a_trailer_without_end(wire: Wire, client: httpx.Client, path: str) -> None:
    wire.send(request(path, CHUNKS[:-2] + b"X: ", "Transfer-Encoding: chunked"))
    for _ in range(5):
        client.get("/livez")
        wire.send(16_384 * b"a")
    assert wire.answer()[0] == 431


def test_long_body_in_many_pieces_is_not_taken_for_a_head(wire: Wire, client: httpx.Client) -> None:
    body = np.zeros((10_000, 3), np.float32).tobytes()
    sent = request("/v1/models/lstm/sequences", body, steps=10_000)
    for begin in range(0, len(sent), 10_000):
        wire.send(sent[begin : begin + 10_000])
        client.get("/livez")
    assert wire.answer()[0] == 200


async def test_missing_announced_body_is_refused(server: Running) -> None:
    """A proxy may lose the body. Without it the session would get a random id."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    path = "/v1/models/lstm/sessions"
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"23")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "asgi": {}}
    await server.uvicorn.config.loaded_app(scope, receive, send)  # type: ignore[operator]
    assert sent[0]["status"] == 400


def test_trailers_are_not_headers(wire: Wire, session: str) -> None:
    chunks = b"c\r\n" + STEP.tobytes() + b"\r\n0\r\nUnroll-Position: 77\r\n\r\n"
    wire.send(request(f"{session}/steps", chunks, "Transfer-Encoding: chunked"))
    assert wire.answer()[0] == 200


def test_refusal_waits_for_earlier_answers(wire: Wire, session: str) -> None:
    wire.send(get("/v1/models") + request(f"{session}/steps") + without_host(get()) + request(f"{session}/steps"))
    assert [wire.answer()[0] for _ in range(3)] == [200, 200, 400]
    assert wire.closed()


def test_the_answer_reaches_a_client_that_is_still_sending(wire: Wire) -> None:
    """Closing a connection with unread data would reset it and lose the answer."""
    head = without_host(request("/v1/models/lstm/sequences", bytes(10_000_000)))
    wire.send(head)
    assert wire.answer()[0] == 400
    wire.end()
    assert wire.closed()


def test_a_host_may_be_empty_or_an_address(wire: Wire) -> None:
    for host in ("", "[::1]:8000", "127.0.0.1:8000", "localhost", "LocalHost:8000"):
        wire.send(get("/livez", f"Host: {host}"))
        assert wire.answer()[0] == 200
    wire.send(without_host(get(version="1.0")))
    assert wire.answer()[0] == 200


def test_an_absolute_url(wire: Wire, session: str) -> None:
    wire.send(request(f"http://other.example{session}/steps"))
    assert wire.answer()[1]["unroll-position"] == "1"


# ── half-closed connections ──────────────────────────────────────────────────────────────────────


def test_requests_before_the_end_of_a_half_closed_connection_are_answered(wire: Wire, session: str) -> None:
    wire.send(request(f"{session}/steps") + get(session) + request(f"{session}/steps"))
    wire.end()
    assert [wire.answer()[0] for _ in range(3)] == [200, 200, 200]
    assert wire.closed()


def test_long_work_is_answered_after_the_client_half_closes(serve: Callable[..., Running]) -> None:
    """The client may have disconnected; an interim answer detects that."""
    running = serve()
    with running.holding("lstm") as held:
        wire = Wire(running.port)
        wire.send(request("/v1/models/lstm/sequences"))
        wire.end()
        held.wait()
        assert wire.answer()[0] == 100
    assert wire.answer()[0] == 200
    assert wire.closed()
    wire.socket.close()


@pytest.mark.parametrize("size", [30, 140, -1])
def test_a_request_that_ends_too_early(wire: Wire, size: int) -> None:
    wire.send(request("/v1/models/lstm/sequences", 10 * STEP.tobytes())[:size])
    wire.end()
    assert wire.answer()[0] == 400
    assert wire.closed()


# ── methods ──────────────────────────────────────────────────────────────────────────────────────

PROBES = ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/lstm/ready"]


@pytest.mark.parametrize("path", PROBES)
def test_probes_by_other_methods(client: httpx.Client, path: str) -> None:
    assert (client.head(path).status_code, client.head(path).content) == (200, b"")
    answer = client.options(path)
    assert (answer.status_code, answer.headers["allow"]) == (200, "GET, HEAD, OPTIONS")


def test_probes_by_other_methods_of_a_server_that_stops(serve: Callable[..., Running]) -> None:
    running = serve()
    with httpx.Client(base_url=running.url) as client:
        running.server.drain()
        for path in ("/readyz", "/v2/health/ready"):
            assert [client.request(method, path).status_code for method in ("GET", "HEAD", "OPTIONS")] == [503] * 3
        assert client.options("/livez").status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/lstm/sessions/a", "DELETE, GET, HEAD, OPTIONS"),
        ("/v1/models/lstm/sessions/a/state", "GET, HEAD, OPTIONS, PUT"),
        ("/v1/models/lstm/sessions/a/steps", "OPTIONS, POST"),
        ("/v1/models/lstm/stream", "GET, HEAD, OPTIONS"),
        ("/v2/models/lstm/infer", "OPTIONS, POST"),
        ("/metrics", "GET, HEAD, OPTIONS"),
    ],
)
def test_methods_of_a_path(client: httpx.Client, path: str, allowed: str) -> None:
    answer = client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    answer = client.options(path)
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allowed, b"")


def test_head_is_get_without_the_body(client: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/models/lstm", "/v2", "/metrics", "/nothing"):
        found, bare = client.get(path), client.head(path)
        assert (bare.status_code, bare.content) == (found.status_code, b"")
        assert bare.headers["content-type"] == found.headers["content-type"]
    assert client.head("/v1/models/lstm/sequences").status_code == 405


def test_nothing_of_the_client_is_in_a_header_of_the_answer(client: httpx.Client) -> None:
    for path in ("/v1/models/", "/v2/", "/livez/", "/v1/models/lstm/sessions/"):
        for headers, status in (({"X-Forwarded-Host": "evil.example"}, 404), ({"Host": "evil.example"}, 403)):
            answer = client.get(path, headers=headers)
            assert answer.status_code == status
            assert "evil" not in str(answer.headers)
