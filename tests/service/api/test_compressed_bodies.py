"""gzip and deflate on every route with a body, and the cost of a hostile compressed body."""

import gzip
import json
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
import wire as open_inference
from problems import assert_problem
from raw_http import STEP, Wire, request
from serving import RAW, Oracle, Running, Serve, raw_steps
from waiting import until

from unroll.service.api import content_coding


def bare_deflate(content: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


CODINGS = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "GZip": ("GZip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "identity": ("identity", bytes),
}

Post = Callable[..., httpx.Response]


@pytest.fixture(params=CODINGS.values(), ids=CODINGS)
def post(client: httpx.Client, request: pytest.FixtureRequest) -> Post:
    """`post(path, content, headers, method="POST")` compresses the body."""
    coding, compress = request.param

    def call(path: str, content: bytes, headers: dict[str, str], method: str = "POST") -> httpx.Response:
        coded = {**headers, "Content-Encoding": coding}
        return client.request(method, path, content=compress(content), headers=coded).raise_for_status()

    return call


def test_every_route_with_a_body(client: httpx.Client, post: Post, oracle: Callable[..., Oracle]) -> None:
    x = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)
    expected = oracle("lstm")(x)
    text = {"Content-Type": "application/json"}
    name = post("/v1/models/lstm/sessions", b'{"durability": "memory"}', text).json()["session_id"]
    session = f"/v1/models/lstm/sessions/{name}"
    assert post(f"{session}/steps", x[:3].tobytes(), raw_steps(x[:3])).content == expected[:3].tobytes()
    body = json.dumps({"inputs": x[3:].tolist()}).encode()
    assert np.array_equal(np.float32(post(f"{session}/steps", body, text).json()["outputs"]), expected[3:])
    fork = post(f"{session}/fork", b"{}", text).json()
    assert fork["position"] == 5
    snapshot = client.get(f"{session}/state").content
    assert post(f"{session}/state", snapshot, RAW, method="PUT").json()["position"] == 5
    assert post("/v1/models/lstm/sequences", x.tobytes(), raw_steps(x)).content == expected.tobytes()
    for binary in (True, False):
        made = open_inference.body({"x": x[np.newaxis]}, binary=binary)
        answer = post("/v2/models/lstm/infer", made.content, made.headers)
        assert open_inference.outputs(answer)[1]["y"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("extra", [[], ["Expect: 100-continue"]], ids=["short way", "framework"])
@pytest.mark.parametrize("chunked", [False, True])
def test_either_way_through_the_server(server: Running, extra: list[str], chunked: bool) -> None:
    body, headers = gzip.compress(STEP.tobytes()), ["Content-Encoding: gzip", *extra]
    if chunked:
        body, headers = (
            b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:]),
            [*headers, "Transfer-Encoding: chunked"],
        )
    wire = Wire(server.port)
    wire.send(request("/v1/models/lstm/sequences", body, *headers))
    if extra:
        assert wire.answer()[0] == 100
    assert wire.answer()[0] == 200
    wire.socket.close()


ROUTES = ["/v1/models/lstm/sequences", "/v1/models/lstm/sessions", "/v2/models/lstm/infer"]


@pytest.fixture(params=ROUTES)
def refused(client: httpx.Client, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`refused(status, code, coding, content)`"""

    def call(status: int, code: str, coding: str, content: bytes) -> None:
        answer = client.post(request.param, content=content, headers={**RAW, "Content-Encoding": coding})
        assert (answer.status_code, answer.json()["code"]) == (status, code)

    return call


def test_damaged_bodies(refused: Callable[..., None]) -> None:
    for coding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", bare_deflate)):
        good = compress(bytes(range(24)))
        for damaged in (b"", good[:-1], good[: len(good) // 2], good + b"more", good + good, b"\x07" * 24):
            refused(400, "malformed_request", coding, damaged)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip"])
def test_other_codings(refused: Callable[..., None], coding: str) -> None:
    refused(415, "unsupported_media_type", coding, gzip.compress(bytes(24)))


def test_the_refusal_of_a_coding_names_those_that_are_taken(client: httpx.Client) -> None:
    answer = client.post(ROUTES[0], content=b"?", headers={**RAW, "Content-Encoding": "br"})
    assert_problem(answer, 415, "unsupported_media_type")
    assert "gzip, deflate" in answer.json()["detail"]


def test_long_bodies_are_decompressed_one_at_a_time(
    server: Running, background: Callable[..., Future], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body stays in memory until it is parsed, so this bounds the memory of many that arrive at once."""
    decompress, tasks = content_coding._decompressed, server.uvicorn.server_state.tasks
    all_came, running, most = threading.Event(), [], []

    def watched(body: bytes, coding: bytes, limit: int) -> bytes:
        if limit <= content_coding._AT_ONCE:
            return decompress(body, coding, limit)
        running.append(body)
        if not all_came.is_set():
            until(lambda: len(tasks) >= 4, "all of them came")
            all_came.set()
        most.append(len(running))
        running.pop()
        return decompress(body, coding, limit)

    monkeypatch.setattr(content_coding, "_decompressed", watched)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(b"{}".ljust(2**19))
    url = f"{server.url}/v1/models/lstm/sessions/none/fork"
    answers = [background(httpx.post, url, content=body, headers=headers) for _ in range(4)]
    assert {answer.result().json()["code"] for answer in answers} == {"session_unknown"}
    assert most == [1] * 4


def test_a_bomb_costs_no_more_than_the_limit(serve: Serve) -> None:
    limit = 200_000
    running = serve(max_body_bytes=limit)
    bomb = gzip.compress(bytes(100_000_000))
    assert len(bomb) < limit
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with httpx.Client(base_url=running.url, headers=headers) as client:
        tracemalloc.start()
        for path in ROUTES:
            answer = client.post(path, content=bomb)
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()
        for size, status in ((limit, 201), (limit + 1, 413)):
            answer = client.post("/v1/models/lstm/sessions", content=gzip.compress(b"{}".ljust(size)))
            assert answer.status_code == status
