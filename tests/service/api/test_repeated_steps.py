"""The server does not parse a repeated head again, and still honours every part of the request."""

import asyncio
import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from oracle import Oracle
from raw_http import STEP, Answer, Wire
from serving import Running, Serve
from streams import Client, frame
from waiting import PATIENCE, until

from unroll.service.core.errors import StoreUnavailable, UnrollError
from unroll.service.store.interface import Commit, Key
from unroll.service.store.record import Gone, Record

ROUNDS = 5


def head(model: str, session: str, size: int = STEP.nbytes, position: object = None) -> bytes:
    lines = [f"POST /v1/models/{model}/sessions/{session}/steps HTTP/1.1"]
    lines += ["host: localhost", "content-type: application/octet-stream"]
    lines += [] if position is None else [f"unroll-position: {position}"]
    return "\r\n".join([*lines, "unroll-steps: 1", f"content-length: {size}", "\r\n"]).encode()


def step(wire: Wire, session: str, x: np.ndarray = STEP, position: object = None, model: str = "gru") -> Answer:
    wire.send(head(model, session, x.nbytes, position) + x.tobytes())
    return wire.answer()


def position_of(client: httpx.Client, session: str, model: str = "gru") -> int:
    return client.get(f"/v1/models/{model}/sessions/{session}").json()["position"]


@pytest.fixture
def open_session(client: httpx.Client) -> Iterator[Callable[[str, str], str]]:
    paths = []

    def call(name: str, model: str = "gru") -> str:
        client.post(f"/v1/models/{model}/sessions", json={"session_id": name}).raise_for_status()
        paths.append(f"/v1/models/{model}/sessions/{name}")
        return name

    yield call
    for path in paths:
        client.delete(path)


@pytest.fixture
def wires(server: Running) -> Iterator[Callable[[int], list[Wire]]]:
    with ExitStack() as stack:

        def call(count: int) -> list[Wire]:
            wires = [Wire(server.port) for _ in range(count)]
            for wire in wires:
                stack.enter_context(closing(wire.socket))
            return wires

        yield call


@pytest.mark.parametrize(("model", "version"), [("gru", "2"), ("two", "1"), ("last", "1")])
def test_clients_that_step_together_get_the_same_answers_as_separately(
    server: Running, wires: Callable, open_session: Callable, oracle: Callable[..., Oracle], model: str, version: str
) -> None:
    alone = oracle(model, version)
    specs = alone.manifest.inputs
    rng, names = np.random.default_rng(5), [open_session(f"together-{i}", model) for i in range(6)]
    given = [[rng.standard_normal((ROUNDS, *spec.shape)).astype("<f4") for spec in specs] for _ in names]
    connections = wires(len(names))
    for t in range(ROUNDS):
        for wire, name, xs in zip(connections, names, given, strict=True):
            body = b"".join(x[t].tobytes() for x in xs)
            wire.send(head(model, name, len(body), t if len(name) % 2 else None) + body)
        for wire, xs in zip(connections, given, strict=True):
            status, headers, body = wire.answer()
            assert (status, headers["unroll-position"]) == (200, str(t + 1))
            outputs, _ = alone.all(*[x[: t + 1] for x in xs])
            last = [
                output[-1] if spec.time else output
                for spec, output in zip(alone.manifest.outputs, outputs, strict=True)
            ]
            assert body == b"".join(output.tobytes() for output in last)


def test_joined_steps_fail_cancel_and_close_individually(
    server: Running, client: httpx.Client, wires: Callable, open_session: Callable, oracle: Callable[..., Oracle]
) -> None:
    names = [open_session(f"crowd-{i}") for i in range(6)]
    *connections, other = wires(len(names) + 1)
    for wire, name in zip(connections, names, strict=True):
        for position in range(2):
            assert step(wire, name, STEP, position)[0] == 200
    invalid, scheduler = np.full_like(STEP, np.nan), server.model("gru").scheduler
    with server.holding("gru") as held:
        connections[0].send(head("gru", names[0], position=2) + STEP.tobytes())
        held.wait()
        for wire, name, x in zip(connections[1:], names[1:], [invalid, STEP, STEP, STEP, STEP], strict=True):
            wire.send(head("gru", name, position=2) + x.tobytes())
        until(lambda: scheduler.in_flight == len(names))
        assert client.delete(f"/v1/models/gru/sessions/{names[2]}").status_code == 200
        assert connections[2].answer()[0] == 410
        connections[3].socket.close()
        until(lambda: scheduler.in_flight == len(names) - 2)
        other.send(head("gru", names[4], position=2) + STEP.tobytes())  # a retry: the first answer may be lost
        assert step(wires(1)[0], names[5], 2 * STEP, 2)[0] == 409
    third = oracle("gru", "2")(np.repeat(STEP, 3, axis=0))[2:].tobytes()
    for wire in (connections[0], connections[4], connections[5], other):
        status, headers, body = wire.answer()
        assert (status, headers["unroll-position"], body) == (200, "3", third)
    status, _, body = connections[1].answer()
    assert (status, b"non_finite_input" in body) == (422, True)
    assert [position_of(client, names[i]) for i in (0, 1, 3, 4, 5)] == [3, 2, 2, 3, 3]
    assert step(connections[1], names[1], STEP, 2)[2] == third


def test_position_in_a_repeated_head_is_read(wire: Wire, open_session: Callable) -> None:
    name = open_session("known")
    first = step(wire, name, STEP, 0)
    assert step(wire, name, STEP, 0) == first
    assert [step(wire, name, STEP, p)[1]["unroll-position"] for p in range(1, 12)] == [str(p + 1) for p in range(1, 12)]
    assert step(wire, name, STEP, 13)[0] == 409
    assert step(wire, name, 2 * STEP, 11)[0] == 409
    assert step(wire, name, STEP, "9" * 30)[0] == 400
    assert step(wire, name, STEP, "+12")[0] == 400
    assert step(wire, name, np.float32([1, 2]), 12)[0] == 422
    assert step(wire, name, STEP, 12)[1]["unroll-position"] == "13"


@pytest.mark.parametrize(
    ("line", "with_line"),
    [
        ("octet-stream", "octet-stream; of=floats"),
        ("application/octet", "Application/octet"),
        ("unroll-steps: 1", "unroll-steps: 1\r\ninference-header-content-length: 5"),
    ],
)
def test_body_of_another_length_is_refused_without_affecting_the_rest_of_the_turn(
    server: Running, wires: Callable, open_session: Callable, line: str, with_line: str
) -> None:
    wrong, right = (open_session(f"{each}-{len(with_line)}") for each in ("wrong", "right"))
    one, other = wires(2)

    def sent(name: str, body: bytes) -> bytes:
        return head("gru", name, len(body)).replace(line.encode(), with_line.encode()) + body

    for position, body in enumerate([STEP.tobytes()] * 3 + [STEP.tobytes()[:8], STEP.tobytes() * 2]):
        with server.in_one_turn():
            one.send(sent(wrong, body))
            other.send(sent(right, STEP.tobytes()))
        assert one.answer()[0] == (200 if position < 3 else 422)
        assert other.answer()[1]["unroll-position"] == str(position + 1)


def test_repeated_head_steps_the_reopened_session(client: httpx.Client, wire: Wire, open_session: Callable) -> None:
    name = open_session("twice")
    for _ in range(3):
        last = step(wire, name)
    assert last[1]["unroll-position"] == "3"
    client.delete(f"/v1/models/gru/sessions/{name}")
    assert step(wire, name)[0] == 410
    client.post("/v1/models/gru/sessions", json={"session_id": name})
    assert [step(wire, name)[1]["unroll-position"] for _ in range(3)] == ["1", "2", "3"]


def test_several_requests_in_one_segment_are_all_read(wire: Wire, open_session: Callable) -> None:
    name = open_session("several")
    one = head("gru", name) + STEP.tobytes()
    wire.send(one)
    wire.answer()
    wire.send(one + one + one[:-5])
    assert [wire.answer()[1]["unroll-position"] for _ in range(2)] == ["2", "3"]
    wire.send(one[-5:])
    assert wire.answer()[1]["unroll-position"] == "4"
    assert step(wire, name)[1]["unroll-position"] == "5"


def test_request_read_while_a_long_body_waits_keeps_its_headers(wire: Wire, open_session: Callable) -> None:
    name, path = open_session("behind"), "POST /v1/models/gru/sequences HTTP/1.1\r\nhost: localhost\r\n"
    long = json.dumps({"inputs": [[[0.125, 0.25, 0.5]] * 5000]}).encode()
    complete = f"{path}content-type: application/json\r\ncontent-length: {len(long)}\r\n\r\n".encode() + long
    wire.send(complete + head("gru", name) + STEP.tobytes())
    assert [wire.answer()[0] for _ in range(2)] == [200, 200]


def test_head_inside_a_header_field_is_not_parsed_as_a_head(
    client: httpx.Client, wire: Wire, open_session: Callable
) -> None:
    mine, theirs = open_session("mine"), open_session("theirs")
    complete = head("gru", theirs) + STEP.tobytes()
    begun = f"POST /v1/models/gru/sessions/{mine}/steps HTTP/1.1\r\nx-field: ".encode()
    wire.send(head("gru", mine) + STEP.tobytes() + begun)
    wire.answer()
    wire.send(complete)  # the first line is the value of the field
    wire.answer()
    assert (position_of(client, mine), position_of(client, theirs)) == (2, 0)
    wire.send(complete)
    wire.answer()
    assert (position_of(client, mine), position_of(client, theirs)) == (2, 1)


def test_retry_waiting_for_the_store_keeps_its_position_ahead_of_the_next_step(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: Callable[..., Oracle]
) -> None:
    running = serve(store=f"file://{tmp_path}/store")
    store = running.server.sessions._store  # type: ignore[attr-defined]
    load, looked_up, may_look, second = store.load_all, threading.Event(), threading.Event(), 2 * STEP

    async def slow(keys: list[Key]) -> list[Record | Gone | UnrollError | None]:
        looked_up.set()
        await asyncio.to_thread(may_look.wait)
        return await load(keys)

    with httpx.Client(base_url=running.url) as client:
        client.post("/v1/models/gru/sessions", json={"session_id": "stored"}).raise_for_status()
    wire = Wire(running.port)
    with closing(wire.socket):
        first = step(wire, "stored", STEP, 0)
        monkeypatch.setattr(store, "load_all", slow)
        wire.send(head("gru", "stored", position=0) + STEP.tobytes())
        assert looked_up.wait(PATIENCE)
        wire.send(head("gru", "stored", position=1) + second.tobytes())
        until(lambda: any(connection.pipeline for connection in [*running.uvicorn.server_state.connections]))
        may_look.set()
        assert wire.answer() == first
        status, headers, body = wire.answer()
        outputs = oracle("gru", "2")(np.concatenate([STEP, second]))
        assert (status, headers["unroll-position"], body) == (200, "2", outputs[1:].tobytes())


def test_step_sent_after_a_lookup_is_not_refused_by_its_result(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica runs a step between the two, and its client sends the next step here."""
    running = serve(store=f"file://{tmp_path}/store")
    store = running.server.sessions._store  # type: ignore[attr-defined]
    load, looked_up, may_end = store.load_all, threading.Event(), threading.Event()

    async def late(keys: list[Key]) -> list[Record | Gone | UnrollError | None]:
        found = await load(keys)
        looked_up.set()
        await asyncio.to_thread(may_end.wait)
        return found

    async def step_elsewhere() -> None:
        (record,) = await load([("gru", "stored")])
        new = replace(record, position=2, kept=()).packed()
        assert await store.commit([Commit(("gru", "stored"), record.token, b"another process.", new)]) == [None]

    with httpx.Client(base_url=running.url) as client:
        client.post("/v1/models/gru/sessions", json={"session_id": "stored"}).raise_for_status()
    here, also_here = Wire(running.port), Wire(running.port)
    with closing(here.socket), closing(also_here.socket):
        first = step(here, "stored", STEP, 0)
        monkeypatch.setattr(store, "load_all", late)
        here.send(head("gru", "stored", position=0) + STEP.tobytes())
        assert looked_up.wait(PATIENCE)
        asyncio.run_coroutine_threadsafe(step_elsewhere(), running.uvicorn.loop).result()
        also_here.send(head("gru", "stored", position=2) + STEP.tobytes())
        until(lambda: len(running.server.sessions._waiting.get(("gru", "stored"), ())) == 2)
        may_end.set()
        assert here.answer() == first
        status, headers, _ = also_here.answer()
        assert (status, headers["unroll-position"]) == (200, "3")


def test_step_committed_just_before_close_is_answered_with_its_own_position(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: Callable
) -> None:
    """The store completes both before the server sees the first result."""
    running = serve(store=f"file://{tmp_path}/store")
    store = running.server.sessions._store  # type: ignore[attr-defined]
    commit, close = store.commit, store.close
    closing_begins, committed, closed = threading.Event(), threading.Event(), threading.Event()

    async def late_commit(commits: list[Commit]) -> list[UnrollError | None]:
        errors = await commit(commits)
        committed.set()
        await asyncio.to_thread(closed.wait)
        return errors

    async def late_close(key: Key, origin: bytes) -> int | None:
        closing_begins.set()
        await asyncio.to_thread(committed.wait)
        return await close(key, origin)

    wire = Wire(running.port)
    with httpx.Client(base_url=running.url) as client, closing(wire.socket):
        client.post("/v1/models/gru/sessions", json={"session_id": "stored"}).raise_for_status()
        step(wire, "stored")
        monkeypatch.setattr(store, "commit", late_commit)
        monkeypatch.setattr(store, "close", late_close)
        deleted = background(client.delete, "/v1/models/gru/sessions/stored")
        assert closing_begins.wait(PATIENCE)
        wire.send(head("gru", "stored") + STEP.tobytes())
        assert deleted.result().json()["position"] == 2
        closed.set()
        status, headers, _ = wire.answer()
        assert (status, headers["unroll-position"]) == (200, "2")


def test_durable_steps_share_a_commit_and_each_has_its_own_result(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: Callable[..., Oracle]
) -> None:
    running = serve(store=f"file://{tmp_path}/store", durability="stored")
    store, scheduler = running.server.sessions._store, running.model("gru").scheduler  # type: ignore[attr-defined]
    commit, together, may_commit = store.commit, list[int](), threading.Event()
    result: list[UnrollError | None] = []

    async def slow(commits: list[Commit]) -> list[UnrollError | None]:
        together.append(len(commits))
        await asyncio.to_thread(may_commit.wait)
        return result * len(commits) or await commit(commits)

    async def begin_anew(name: str) -> None:
        record = await store.load(("gru", name))
        new = Commit(
            ("gru", name), record.token, b"another process.", replace(record, position=0, row=b"", kept=()).packed()
        )
        assert await store.commit([new]) == [None]

    names = [f"stored-{i}" for i in range(5)]
    with httpx.Client(base_url=running.url) as client, ExitStack() as stack:
        for name in names:
            client.post("/v1/models/gru/sessions", json={"session_id": name}).raise_for_status()
        wires = [Wire(running.port) for _ in names]
        other = Wire(running.port)
        for wire in (*wires, other):
            stack.enter_context(closing(wire.socket))
        for position, (wire, name) in itertools.product(range(3), zip(wires, names, strict=True)):
            assert step(wire, name, STEP, position)[0] == 200
        asyncio.run_coroutine_threadsafe(begin_anew(names[1]), running.uvicorn.loop).result()
        monkeypatch.setattr(store, "commit", slow)
        with running.in_one_turn():
            for i, (wire, name) in enumerate(zip(wires, names, strict=True)):
                wire.send(head("gru", name, position=None if i == 1 else 3) + STEP.tobytes())
        until(lambda: together == [len(names)])
        other.send(head("gru", names[2], position=3) + STEP.tobytes())
        wires[1].send(head("gru", names[1]) + STEP.tobytes())
        until(lambda: scheduler.counters.replayed == 1)
        may_commit.set()
        outputs = oracle("gru", "2")(np.repeat(STEP, 5, axis=0))
        for at, wires_at in ((4, [wires[0], *wires[2:], other]), (1, wires[1:2]), (2, wires[1:2])):
            for wire in wires_at:
                status, headers, body = wire.answer()
                assert (status, headers["unroll-position"], body) == (200, str(at), outputs[at - 1].tobytes())
        result.append(StoreUnavailable("as asked", 0.1))
        with running.in_one_turn():
            for i in (0, 2):
                wires[i].send(head("gru", names[i], position=4) + STEP.tobytes())
        for i in (0, 2):
            status, _, body = wires[i].answer()
            assert (status, b"store_unavailable" in body) == (503, True)
        result.clear()
        assert step(wires[0], names[0], STEP, 4)[2] == outputs[4].tobytes()
        assert position_of(client, names[2]) == 4


@pytest.mark.parametrize("durability", ["memory", "stored"])
def test_requests_and_frames_that_are_read_at_once_run_in_one_batch(
    serve: Serve, tmp_path: Path, oracle: Callable[..., Oracle], durability: str
) -> None:
    running = serve(store=f"file://{tmp_path}/store", durability=durability)
    alone, counters = oracle("gru", "2"), running.model("gru").scheduler.counters
    streams = [Client(running, alone.manifest) for _ in range(2)]
    names = ["asked-0", "asked-1"]
    with httpx.Client(base_url=running.url) as client, ExitStack() as stack:
        for name in names:
            client.post("/v1/models/gru/sessions", json={"session_id": name}).raise_for_status()
        wires = [Wire(running.port) for _ in names]
        for each in (*wires, *streams):
            stack.enter_context(closing(each.socket))
        for stream in streams:
            stream.bind(0)
        for t in range(ROUNDS):
            before, expected = counters.batches, alone(np.repeat(STEP, t + 1, axis=0))[t:].tobytes()
            with running.in_one_turn():
                for wire, name in zip(wires, names, strict=True):
                    wire.send(head("gru", name) + STEP.tobytes())
                for stream in streams:
                    stream.socket.send(frame((0, t, STEP)))
            answers = [(int(headers["unroll-position"]), body) for _, headers, body in (w.answer() for w in wires)]
            answers += [(reply.position, reply.content) for stream in streams for reply in stream.receive(1)[0]]
            assert answers == [(t + 1, expected)] * 4
            assert counters.batches == before + 1


def test_a_session_is_opened_although_its_client_disconnects(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(store=f"file://{tmp_path}/store", durability="stored")
    store = running.server.sessions._store  # type: ignore[attr-defined]
    commit, reached, may_commit = store.commit, threading.Event(), threading.Event()

    async def slow(commits: list[Commit]) -> list[UnrollError | None]:
        reached.set()
        await asyncio.to_thread(may_commit.wait)
        return await commit(commits)

    monkeypatch.setattr(store, "commit", slow)
    wire, content = Wire(running.port), b'{"session_id":"left"}'
    with closing(wire.socket):
        wire.send(
            b"POST /v1/models/gru/sessions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        assert reached.wait(PATIENCE)
    may_commit.set()
    with httpx.Client(base_url=running.url) as client:
        until(lambda: client.get("/v1/models/gru/sessions/left").status_code == 200)


def test_heads_that_never_repeat_are_all_parsed(wire: Wire, open_session: Callable) -> None:
    name = open_session("unlike")
    for i in range(12):
        wire.send(
            head("gru", name, position=i).replace(b"\r\n\r\n", b"\r\nx-request-id: %d\r\n\r\n" % i) + STEP.tobytes()
        )
        assert wire.answer()[1]["unroll-position"] == str(i + 1)
    assert [step(wire, name)[1]["unroll-position"] for _ in range(3)] == ["13", "14", "15"]


def outcomes(
    taken: list[np.ndarray], sent: list[tuple[int | None, np.ndarray]]
) -> Iterator[tuple[list[np.ndarray], list[int | str]]]:
    """For each order of the steps, yield the session's inputs afterwards and each step's position or error code."""
    for order in itertools.permutations(range(len(sent))):
        after, got = [*taken], dict[int, int | str]()
        for i in order:
            position, x = sent[i]
            ahead = 0 if position is None else position - len(after)
            if not np.isfinite(x).all():
                got[i] = "non_finite_input"
            elif ahead == 0:
                after.append(x)
                got[i] = len(after)
            elif ahead == -1:
                got[i] = len(after) if np.array_equal(x, after[-1]) else "payload_mismatch"
            else:
                got[i] = "position_gap" if ahead > 0 else "position_too_old"
        yield after, [got[i] for i in range(len(sent))]


def test_steps_read_at_once_are_answered_as_in_some_serial_order(
    server: Running, wires: Callable, open_session: Callable, oracle: Callable[..., Oracle]
) -> None:
    chance, alone = random.Random(3), oracle("gru", "2")
    taken: dict[str, list[np.ndarray]] = {open_session(f"turn-{i}"): [] for i in range(4)}
    connections = {name: wires(3) for name in taken}
    valid = [STEP, 2 * STEP]
    for _ in range(40):
        sent: dict[str, list[tuple[int | None, np.ndarray]]] = {name: [] for name in taken}
        with server.in_one_turn():
            for name, each in connections.items():
                at = len(taken[name])
                for wire, knows in zip(each[: chance.randint(1, 3)], (True, True, False), strict=False):
                    position = max(0, at + chance.choice([0, 0, 0, 0, -1, 1, -2])) if knows else None
                    x = chance.choice([*valid, *valid, np.full_like(STEP, np.nan)])
                    wire.send(head("gru", name, position=position) + x.tobytes())
                    sent[name].append((position, x))
        for name, steps in sent.items():
            answers = [wire.answer() for wire, _ in zip(connections[name], steps, strict=False)]
            got = [
                int(headers["unroll-position"]) if status == 200 else json.loads(body)["code"]
                for status, headers, body in answers
            ]
            for after, expected in outcomes(taken[name], steps):
                outputs = alone(np.concatenate(after)) if after else ()
                if got == expected and all(
                    outputs[reached - 1].tobytes() == body
                    for reached, (_, _, body) in zip(got, answers, strict=True)
                    if isinstance(reached, int)
                ):
                    taken[name] = after
                    break
            else:
                raise AssertionError((name, len(taken[name]), steps, got))
