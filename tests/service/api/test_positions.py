"""A chunk is applied once however often it is sent, over every transport."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

import httpx
import numpy as np
import pytest
import wire
from serving import Oracle, Running, Serve, metric, raw_steps
from waiting import until

Background = Callable[..., Future]

_ids = count(1)


@dataclass
class Stream:
    """One session, stepped over one of the transports."""

    way: str
    client: httpx.Client
    id: str
    model: str = "lstm"

    @property
    def path(self) -> str:
        return f"/v1/models/{self.model}/sessions/{self.id}"

    def send(self, x: np.ndarray, position: int | None, **more: object) -> httpx.Response:
        if self.way == "json":
            place = {} if position is None else {"position": position}
            return self.client.post(f"{self.path}/steps", json={"inputs": x.tolist(), **place})
        if self.way == "raw":
            place = {} if position is None else {"Unroll-Position": str(position)}
            return self.client.post(f"{self.path}/steps", content=x.tobytes(), headers={**raw_steps(x), **place})
        if position is not None:
            more["sequence_position"] = position
        return wire.infer(self.client, self.model, x, binary=self.way == "v2 binary", sequence_id=self.id, **more)

    def outputs(self, answer: httpx.Response) -> np.ndarray:
        assert answer.status_code == 200, answer.text
        if self.way == "json":
            return np.array(answer.json()["outputs"], np.float32)
        if self.way == "raw":
            return np.frombuffer(answer.content, "<f4").reshape(-1, 2)
        return wire.outputs(answer)[1]["y"][0]

    def position(self, answer: httpx.Response) -> int:
        if self.way.startswith("v2"):
            return wire.outputs(answer)[0]["parameters"]["sequence_position"]
        return int(answer.headers["unroll-position"])

    def digest(self) -> tuple[bytes, dict]:
        return self.client.get(f"{self.path}/state").content, self.client.get(self.path).json()

    def refuses(self, x: np.ndarray, position: int, code: str, expected: int) -> None:
        before = self.digest()
        answer = self.send(x, position)
        assert answer.status_code == 409, answer.text
        assert (answer.json()["code"], answer.json()["expected"]) == (code, expected)
        assert self.digest() == before


WAYS = ("json", "raw", "v2 json", "v2 binary")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def opened(way: str, client: httpx.Client, model: str = "lstm") -> Stream:
    name = f"position-{next(_ids)}"
    client.post(f"/v1/models/{model}/sessions", json={"session_id": name}).raise_for_status()
    return Stream(way, client, name, model)


@pytest.fixture
def stream(way: str, client: httpx.Client) -> Stream:
    return opened(way, client)


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((8, 3)).astype(np.float32)


def test_a_retry_gets_the_same_bytes(stream: Stream, x: np.ndarray, oracle: Callable[..., Oracle]) -> None:
    outputs = []
    for start, end in ((0, 3), (3, 4), (4, 8)):
        first = stream.send(x[start:end], start)
        after = stream.digest()
        for _ in range(3):
            again = stream.send(x[start:end], start)
            assert (again.status_code, again.content) == (200, first.content)
            assert again.headers == first.headers
        assert stream.digest() == after
        assert stream.position(first) == end
        outputs.append(stream.outputs(first))
    assert np.array_equal(np.concatenate(outputs), oracle("lstm")(x))


def test_a_retry_of_a_chunk_sent_without_position(stream: Stream, x: np.ndarray) -> None:
    first = stream.send(x[:2], None)
    assert stream.send(x[:2], 0).content == first.content


def test_without_position_the_same_again_is_new(stream: Stream, x: np.ndarray) -> None:
    assert stream.position(stream.send(x[:2], None)) == 2
    assert stream.position(stream.send(x[:2], None)) == 4


def test_another_payload(stream: Stream, x: np.ndarray) -> None:
    stream.send(x[:2], 0)
    stream.send(x[2:4], 2)
    for other in (x[3:5], x[2:3], x[2:5], np.nextafter(x[2:4], np.float32(9))):
        stream.refuses(other, 2, "payload_mismatch", 4)
    negative = x[2:4].copy()
    negative[0, 0] *= -1
    stream.refuses(negative, 2, "payload_mismatch", 4)


def test_a_gap(stream: Stream, x: np.ndarray) -> None:
    stream.refuses(x[:2], 1, "position_gap", 0)
    stream.send(x[:2], 0)
    stream.refuses(x[2:4], 3, "position_gap", 2)
    stream.refuses(x[2:4], 2**53, "position_gap", 2)
    assert stream.position(stream.send(x[2:4], 2)) == 4


def test_too_old(stream: Stream, x: np.ndarray) -> None:
    for start in (0, 2, 4):
        stream.send(x[start : start + 2], start)
    for position in (0, 1, 2, 3, 5):
        stream.refuses(x[position : position + 2], position, "position_too_old", 6)


def test_a_failed_chunk_leaves_its_place_free(way: str, client: httpx.Client, x: np.ndarray) -> None:
    stream = opened(way, client, "hot")
    stream.send(x[:2], 0)
    before = stream.digest()
    for _ in range(2):
        failed = stream.send(np.full((1, 3), 3e38, np.float32), 2)
        assert (failed.status_code, failed.json()["code"]) == (422, "non_finite_output")
    assert stream.digest() == before
    assert stream.position(stream.send(x[2:4], 2)) == 4


def test_every_transport_recognises_retries_of_another(client: httpx.Client, x: np.ndarray) -> None:
    first = opened("json", client)
    outputs = first.outputs(first.send(x[:3], 0))
    after = first.digest()
    for way in WAYS:
        other = Stream(way, client, first.id)
        assert np.array_equal(other.outputs(other.send(x[:3], 0)), outputs)
    assert first.digest() == after


# ── while the original is in flight ──────────────────────────────────────────────────────────────


@pytest.fixture
def own(serve: Serve) -> Iterator[tuple[Running, httpx.Client]]:
    """A server that no other test uses."""
    running = serve()
    with httpx.Client(base_url=running.url, limits=httpx.Limits(max_connections=None)) as client:
        yield running, client


def test_a_retry_in_flight_is_one_application(
    own: tuple[Running, httpx.Client], way: str, x: np.ndarray, background: Background, oracle: Callable[..., Oracle]
) -> None:
    running, client = own
    stream = opened(way, client)
    counters = running.model("lstm").scheduler.counters
    with running.holding("lstm") as held:
        answers = [background(stream.send, x[:2], 0)]
        held.wait()
        answers += [background(stream.send, x[:2], 0) for _ in range(5)]
        until(lambda: counters.replayed == 5)
        conflict = stream.send(x[:3], 0)
        assert (conflict.status_code, conflict.json()["code"]) == (409, "payload_mismatch")
        gap = stream.send(x[2:4], 3)
        assert (gap.status_code, gap.json()["expected"]) == (409, 2)
    contents = {answer.result().content for answer in answers}
    assert len(contents) == 1
    assert (counters.chunks, counters.steps) == (1, 2)
    assert np.array_equal(stream.outputs(answers[0].result()), oracle("lstm")(x[:2]))
    assert stream.position(stream.send(x[2:4], 2)) == 4


def test_a_pipeline_keeps_its_order_and_knows_each_of_its_chunks(
    own: tuple[Running, httpx.Client], x: np.ndarray, background: Background, oracle: Callable[..., Oracle]
) -> None:
    running, client = own
    stream = opened("raw", client)
    scheduler = running.model("lstm").scheduler
    with running.holding("lstm") as held:
        answers = []
        for i in range(8):
            answers.append(background(stream.send, x[i : i + 1], i))
            until(lambda i=i: scheduler.in_flight == i + 1)
        held.wait()
        retries = [background(stream.send, x[i : i + 1], i) for i in range(8)]
        until(lambda: scheduler.counters.replayed == 8)
    outputs = [stream.outputs(answer.result()) for answer in answers]
    assert np.array_equal(np.concatenate(outputs), oracle("lstm")(x))
    assert [a.result().content for a in retries] == [a.result().content for a in answers]


def test_many_at_the_same_place_at_once(
    own: tuple[Running, httpx.Client], x: np.ndarray, background: Background, oracle: Callable[..., Oracle]
) -> None:
    """One payload wins; identical requests get its reply, and different ones a conflict."""
    _, client = own
    stream = opened("raw", client)
    history: list[np.ndarray] = []
    for _ in range(10):
        payloads = [x[:2], x[2:4], x[4:6]] * 4
        position = sum(map(len, history))
        answers = [background(stream.send, payload, position) for payload in payloads]
        taken = [i for i, answer in enumerate(answers) if answer.result().status_code == 200]
        assert taken
        assert {i % 3 for i in taken} == {taken[0] % 3}
        assert len(taken) == 4
        assert len({answers[i].result().content for i in taken}) == 1
        assert all(a.result().json()["code"] == "payload_mismatch" for i, a in enumerate(answers) if i not in taken)
        history.append(payloads[taken[0]])
        whole = oracle("lstm")(np.concatenate(history))
        assert np.array_equal(stream.outputs(answers[taken[0]].result()), whole[position:])
    assert metric(client.get("/metrics").text, "unroll_replayed_total", model="lstm") == 30


def test_retry_of_a_chunk_after_its_client_disconnects(
    own: tuple[Running, httpx.Client], background: Background, oracle: Callable[..., Oracle]
) -> None:
    """The first client leaves while a piece of its long chunk runs; the retry arrives before that piece completes."""
    running, client = own
    stream = opened("raw", client)
    x = np.tile(np.float32([[0.1, -0.2, 0.3]]), (2000, 1))  # several pieces; large enough to be cancelled
    scheduler = running.model("lstm").scheduler
    head = f"POST {stream.path}/steps HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    head += f"Unroll-Position: 0\r\nUnroll-Steps: 2000\r\nContent-Length: {x.nbytes}\r\n\r\n"
    with running.holding("lstm") as held:
        with socket.create_connection(("127.0.0.1", running.port)) as leaving:
            leaving.sendall(head.encode() + x.tobytes())
            held.wait()
        until(lambda: next(iter(scheduler.sessions)).active.abandoned is not None)
        retry = background(stream.send, x, 0)
        until(lambda: scheduler.counters.replayed == 1)
    assert np.array_equal(stream.outputs(retry.result()), oracle("lstm")(x))


def test_a_reply_too_large_to_keep_is_marked_and_its_retry_is_refused(serve: Serve) -> None:
    """The limit fits 64 of the largest replies. The 16-byte reply of one step with two outputs has its own space."""
    running = serve(reply_bytes=64 * 16)
    x = np.tile(np.float32([[0.1, -0.2, 0.3]]), (2, 1))
    with httpx.Client(base_url=running.url) as client:
        for way in WAYS:
            stream = opened(way, client)
            for position, count, header in ((0, 2, None), (2, 5, "false"), (7, 1, None)):
                sent = np.resize(x, (count, 3))
                first = stream.send(sent, position)
                assert (first.status_code, first.headers.get("unroll-reply-kept")) == (200, header), way
                retry = stream.send(sent, position)
                if header is None:
                    assert retry.content == first.content
                else:
                    assert (retry.status_code, retry.json()["code"]) == (409, "position_too_old")
                    assert (retry.json()["expected"], "too large" in retry.text) == (7, True)


# ── requests that begin and end sequences ────────────────────────────────────────────────────────


@pytest.mark.parametrize("binary", [False, True])
def test_retries_of_start_and_end(
    client: httpx.Client, x: np.ndarray, oracle: Callable[..., Oracle], binary: bool
) -> None:
    stream = Stream("v2 binary" if binary else "v2 json", client, f"start-{next(_ids)}")
    start = {"sequence_start": True, "sequence_end": False}
    end = {"sequence_start": False, "sequence_end": True}
    restarted = metric(client.get("/metrics").text, "unroll_sessions_restarted_total")
    first = stream.send(x[:3], 0, **start)
    after = stream.digest()
    assert stream.send(x[:3], 0, **start).content == first.content
    assert stream.digest() == after
    conflict = stream.send(x[1:4], 0, **start)
    assert (conflict.status_code, conflict.json()["code"]) == (409, "payload_mismatch")
    last = stream.send(x[3:], 3, **end)
    for _ in range(3):
        assert stream.send(x[3:], 3, **end).content == last.content
    both = np.concatenate([stream.outputs(first), stream.outputs(last)])
    assert np.array_equal(both, oracle("lstm")(x))
    for other in (x[2:], x[3:5]):
        gone = stream.send(other, 3, **end)
        assert (gone.status_code, gone.json()["code"]) == (410, "session_closed")
    assert client.get(stream.path).status_code == 410
    assert metric(client.get("/metrics").text, "unroll_sessions_restarted_total") == restarted


def test_a_retry_of_start_and_end_in_one(client: httpx.Client, x: np.ndarray) -> None:
    stream = Stream("v2 binary", client, f"start-{next(_ids)}")
    flags = {"sequence_start": True, "sequence_end": True}
    opened_before = metric(client.get("/metrics").text, "unroll_sessions_opened_total")
    first = stream.send(x, 0, **flags)
    assert stream.send(x, 0, **flags).content == first.content
    assert metric(client.get("/metrics").text, "unroll_sessions_opened_total") == opened_before + 1


def test_retries_of_start_and_end_in_flight(
    own: tuple[Running, httpx.Client], x: np.ndarray, background: Background
) -> None:
    running, client = own
    stream = Stream("v2 binary", client, "7")
    counters = running.model("lstm").scheduler.counters
    flags = {"sequence_start": True, "sequence_end": True}
    with running.holding("lstm") as held:
        answers = [background(stream.send, x, 0, **flags)]
        held.wait()
        answers += [background(stream.send, x, 0, **flags) for _ in range(3)]
        until(lambda: counters.replayed == 3)
    assert len({answer.result().content for answer in answers}) == 1
    assert (counters.opened, counters.chunks, counters.restarted) == (1, 1, 0)


def test_a_start_elsewhere_than_0_is_refused(client: httpx.Client, x: np.ndarray) -> None:
    stream = Stream("v2 json", client, f"start-{next(_ids)}")
    answer = stream.send(x, 3, sequence_start=True)
    assert answer.status_code == 400
    assert client.get(stream.path).status_code == 404
