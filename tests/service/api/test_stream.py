"""The WebSocket stream against the model run over the whole input: nothing lost, doubled or mixed, whatever is sent."""

import asyncio
import json
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
import serving
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import RAW, HeldEngine, Oracle, Running, Serve, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from unroll.bundle import Manifest
from unroll.service import app
from unroll.service.api import stream
from unroll.service.api.server import Server
from unroll.service.api.stream import SLICE, WINDOW, Stream
from unroll.service.core.clock import ManualClock
from unroll.service.settings import Settings

Oracles = Callable[..., Oracle]
Background = Callable[..., Future]

PATIENCE = 20
NOBODY = 2**32 - 1  # a handle no test binds
UNSAID = 2**64 - 1

_ids = count(1)


@dataclass(frozen=True)
class Reply:
    """One entry of a frame of outputs. position: reached. outputs: by the manifest's order."""

    handle: int
    steps: int
    position: int
    outputs: list[np.ndarray]

    @property
    def content(self) -> bytes:
        return b"".join(array.tobytes() for array in self.outputs)


def frame(*entries: tuple) -> bytes:
    """entries: (handle, position or None, input, ...), inputs (T, *shape) in the manifest's order. By the book."""
    head = struct.pack("<BBHI", 1, 0, 0, len(entries))
    table = [struct.pack("<IIQ", h, len(x), UNSAID if p is None else p) for h, p, x, *_ in entries]
    columns = zip(*(entry[2:] for entry in entries), strict=True)
    return b"".join([head, *table, *[array.tobytes() for column in columns for array in column]])


def replies(manifest: Manifest, message: bytes) -> list[Reply]:
    kind, flags, reserved, number = struct.unpack_from("<BBHI", message)
    assert (kind, flags, reserved) == (2, 0, 0)
    assert number >= 1
    entries = list(struct.iter_unpack("<IIQ", message[8 : 8 + 16 * number]))
    rest = message[8 + 16 * number :]
    found = [Reply(*entry, []) for entry in entries]
    for spec in manifest.outputs:
        for reply in found:
            shape = (reply.steps, *spec.shape) if spec.time else spec.shape
            size = int(np.prod(shape)) * spec.numpy.itemsize
            reply.outputs.append(np.frombuffer(rest[:size], spec.numpy).reshape(shape))
            rest = rest[size:]
    assert rest == b""
    return found


class Client:
    """One connection."""

    def __init__(self, running: Running, manifest: Manifest, model: str | None = None, **options: object) -> None:
        self.manifest = manifest
        path = f"/v1/models/{model or manifest.name}/stream"
        dialled = connect(f"ws://{running.address}{path}", max_size=None, **options)  # type: ignore[arg-type]
        self.socket: ClientConnection = dialled.__enter__()

    def control(self, op: str, **members: object) -> dict:
        self.socket.send(json.dumps({"op": op, **members}))
        message = self.socket.recv(PATIENCE)
        assert isinstance(message, str)
        return json.loads(message)

    def open(self, *wanted: dict) -> list[dict]:
        answer = self.control("open", sessions=list(wanted))
        assert answer["op"] == "opened", answer
        assert [item["handle"] for item in answer["sessions"]] == [item["handle"] for item in wanted]
        return answer["sessions"]

    def bind(self, *handles: int, **options: object) -> list[str]:
        """Open a new session for each handle; returns their ids."""
        opened = self.open(*[{"handle": handle, **options} for handle in handles])
        assert not [item for item in opened if "error" in item], opened
        return [item["session_id"] for item in opened]

    def receive(self, number: int) -> tuple[list[Reply], list[dict]]:
        """As many answers: outputs, and errors."""
        good: list[Reply] = []
        bad: list[dict] = []
        while len(good) + len(bad) < number:
            message = self.socket.recv(PATIENCE)
            if isinstance(message, str):
                bad.append(json.loads(message))
                assert bad[-1]["op"] == "error"
                assert bad[-1]["detail"]
            else:
                good += replies(self.manifest, message)
        assert len(good) + len(bad) == number
        return good, bad

    def step(self, *entries: tuple) -> dict[int, Reply]:
        """All must succeed, and each handle be there once."""
        self.socket.send(frame(*entries))
        good, bad = self.receive(len(entries))
        assert not bad
        assert sorted(reply.handle for reply in good) == sorted(entry[0] for entry in entries)
        return {reply.handle: reply for reply in good}

    def refused(self, *entry: object) -> tuple[str, dict]:
        """The code of the error that this entry, alone in its frame, is answered by, and the whole."""
        self.socket.send(frame(entry))
        good, (error,) = self.receive(1)
        assert not good
        assert (error["handle"], error["position"]) == entry[:2]
        return error["code"], error

    def abort(self) -> None:
        """Cut the connection as a crash does: unread answers are lost, and nobody says goodbye."""
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.socket.shutdown(socket.SHUT_RD)  # wakes the thread that reads, and that then closes


Dial = Callable[..., Client]


class Plain(Running):
    """A server whose WebSocket protocol is uvicorn's own, as any ASGI server's would be."""

    def __init__(self, settings: Settings) -> None:
        def config(application: object, *_: object) -> uvicorn.Config:
            options = {"access_log": False, "log_config": None, "ws_per_message_deflate": False}
            return uvicorn.Config(application, host="127.0.0.1", port=0, **options)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "uvicorn_config", config)
            super().__init__(settings)


@pytest.fixture(scope="session")
def plain(repository: Path) -> Iterator[Running]:
    running = Plain(Settings(repository=repository))
    yield running
    running.stop()
    assert not running.server.streams


@pytest.fixture(params=["direct", "plain"])
def any_server(request: pytest.FixtureRequest) -> Running:
    return request.getfixturevalue("server" if request.param == "direct" else "plain")


@pytest.fixture
def dial(server: Running, oracle: Oracles) -> Iterator[Dial]:
    """`dial(name="lstm", model=…, running=…)`; every connection is closed after the test, and leaves nothing."""
    clients: list[tuple[Running, Client]] = []

    def call(name: str = "lstm", *, running: Running = server, **options: object) -> Client:
        clients.append((running, Client(running, oracle(name).manifest, **options)))  # type: ignore[arg-type]
        return clients[-1][1]

    yield call
    for _, client in clients:
        with suppress(OSError):
            client.socket.close()
    until(lambda: not any(running.server.streams for running, _ in clients), "the end of the streams")


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((12, 3)).astype("<f4")


def inputs_of(manifest: Manifest, rng: np.random.Generator, steps: int) -> list[np.ndarray]:
    return [
        rng.integers(0, spec.limit, (steps, *spec.shape)).astype(spec.numpy)
        if spec.limit
        else rng.standard_normal((steps, *spec.shape)).astype(spec.numpy)
        for spec in manifest.inputs
    ]


# ── right ────────────────────────────────────────────────────────────────────────────────────────


def test_hundreds_of_sessions_in_a_frame(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    """More than fit one batch, in another order each time; now and then not all of them."""
    client, model = dial(running=any_server), oracle("lstm")
    whole = rng.standard_normal((300, 7, 3)).astype("<f4")
    client.bind(*range(300))
    got: dict[int, list[np.ndarray]] = {handle: [] for handle in range(300)}
    at = [0] * 300
    for steps in (1, 2, 1, 3):
        for handles in np.array_split(rng.permutation(300), rng.integers(1, 4)):
            said = [None if handle % 5 == 0 else at[handle] for handle in handles]
            sent = [(h, p, whole[h, at[h] : at[h] + steps]) for h, p in zip(handles.tolist(), said, strict=True)]
            for handle, reply in client.step(*sent).items():
                at[handle] += steps
                assert (reply.steps, reply.position) == (steps, at[handle])
                got[handle].append(reply.outputs[0])
    for handle, outputs in got.items():
        assert np.array_equal(np.concatenate(outputs), model(whole[handle]))


@pytest.mark.parametrize("name", ["lstm", "gru", "last", "tokens", "two"])
def test_chunks_of_any_length_together(
    any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator, name: str
):
    version = "2" if name == "gru" else "1"
    client, model = dial(name, running=any_server), oracle(name, version)
    handles = [4, 0, 2**32 - 2, 17, 3]
    client.bind(*handles)
    whole = {handle: inputs_of(client.manifest, rng, 400) for handle in handles}
    at = dict.fromkeys(handles, 0)
    for lengths in ([1, 2, 200, 1, 3], [2, 2, 2, 2, 2], [64, 65, 1, 128, 2], [1], [7]):
        sent = []
        for handle, steps in zip(handles, lengths, strict=False):
            begin, at[handle] = at[handle], at[handle] + steps
            sent.append((handle, begin, *[array[begin : at[handle]] for array in whole[handle]]))
        for handle, reply in client.step(*sent).items():
            end = at[handle]
            assert reply.position == end
            expected, _ = model.all(*[array[:end] for array in whole[handle]])
            for spec, array, output in zip(client.manifest.outputs, expected, reply.outputs, strict=True):
                assert np.array_equal(output, array[end - reply.steps :] if spec.time else array)


def test_one_step_a_frame(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    client = dial(running=any_server)
    client.bind(0)
    got = [client.step((0, None, x[i : i + 1]))[0].outputs[0] for i in range(len(x))]
    assert np.array_equal(np.concatenate(got), oracle("lstm")(x))


class Crew:
    """Sessions that step together, time after time, and what each was given and answered."""

    def __init__(self, running: Running, client: Client, rng: np.random.Generator) -> None:
        self.running = running
        self.client = client
        self.rng = rng
        self.handles = [*range(6)]
        self.ids = dict(zip(self.handles, client.bind(*self.handles), strict=True))
        self.given: dict[int, list[np.ndarray]] = {handle: [] for handle in self.handles}
        self.got: dict[int, list[np.ndarray]] = {handle: [] for handle in self.handles}

    def position(self, handle: int) -> int:
        return sum(map(len, self.given[handle]))

    def steps(self, number: int = 1) -> np.ndarray:
        return self.rng.standard_normal((number, 3)).astype("<f4")

    def took(self, handle: int, x: np.ndarray, reply: Reply) -> None:
        self.given[handle].append(x)
        self.got[handle].append(reply.outputs[0])
        assert (reply.position, reply.steps) == (self.position(handle), len(x))

    def step(self, *handles: int, number: int = 1, said: bool = True) -> list[tuple]:
        """A frame of these, or of all."""
        at = [(handle, self.position(handle) if said else None) for handle in handles or self.handles]
        sent = [(handle, position, self.steps(number)) for handle, position in at]
        for handle, reply in self.client.step(*sent).items():
            self.took(handle, next(x for h, _, x in sent if h == handle), reply)
        return sent

    def together(self) -> list[tuple]:
        """Step until they are one record."""
        for said in (True, True, False, True):
            sent = self.step(said=said)
        table = self.running.model("lstm").scheduler.sessions
        assert {s.id for cohort in table.cohorts for s in cohort.sessions}.issuperset(self.ids.values())
        return sent

    def bind(self, handle: int) -> None:
        """A handle that is free means a new session."""
        (self.ids[handle],) = self.client.bind(handle)
        self.given[handle], self.got[handle] = [], []


def test_the_same_frame_time_after_time(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    """Whatever comes between: the sessions are where each of them would be by itself."""
    model, client = oracle("lstm"), dial(running=any_server)
    crew = Crew(any_server, client, rng)
    rest = httpx.Client(base_url=f"http://{any_server.address}/v1/models/lstm/sessions")

    def right() -> None:
        for handle in crew.handles:
            assert np.array_equal(np.concatenate(crew.got[handle]), model(np.concatenate(crew.given[handle])))

    def steps_by_rest(handle: int) -> None:
        x, at = crew.steps(), {"Unroll-Position": f"{crew.position(handle)}"}
        answer = rest.post(f"/{crew.ids[handle]}/steps", content=x.tobytes(), headers={**RAW, **at})
        reached = int(answer.headers["unroll-position"])
        crew.took(handle, x, Reply(handle, 1, reached, [np.frombuffer(answer.content, "<f4").reshape(1, 2)]))

    def odd_one(handle: int, position: int, x: np.ndarray, code: str, *, said: bool = True) -> None:
        """One entry is refused, and the others step."""
        sent = [(h, crew.position(h) if said else None, crew.steps()) for h in crew.handles if h != handle]
        sent.insert(handle, (handle, position, x))
        client.socket.send(frame(*sent))
        good, (error,) = client.receive(6)
        assert (error["handle"], error["code"]) == (handle, code)
        for reply in good:
            crew.took(reply.handle, sent[reply.handle][2], reply)

    def again(sent: list[tuple]) -> None:
        for handle, reply in client.step(*sent).items():
            assert reply.outputs[0].tobytes() == crew.got[handle][-1].tobytes()

    with rest:
        again(crew.together())
        steps_by_rest(2)
        crew.together()
        assert rest.get(f"/{crew.ids[3]}").json()["position"] == crew.position(3)
        crew.together()
        crew.step(1)
        crew.together()
        crew.step(*crew.handles[:3])
        crew.step(*crew.handles[::-1])
        crew.together()
        crew.step(number=2)
        again(crew.step())
        crew.together()
        odd_one(4, crew.position(4) + 1, crew.steps(), "position_gap")
        crew.together()
        odd_one(2, crew.position(2) + 1, crew.steps(), "position_gap", said=False)
        crew.together()
        odd_one(1, crew.position(1), np.full((1, 3), np.nan, "<f4"), "non_finite_input")
        crew.together()
        odd_one(0, crew.position(0) - 1, crew.steps(), "payload_mismatch")
        crew.together()
        right()

        at, x = {handle: crew.position(handle) for handle in crew.handles}, [crew.steps() for _ in crew.handles]
        client.socket.send(frame(*[(h, at[h] if h % 2 else None, x[h]) for h in crew.handles]))
        for reply in client.receive(6)[0]:
            crew.took(reply.handle, x[reply.handle], reply)
        crew.together()

        forked = rest.post(f"/{crew.ids[5]}/fork").json()
        assert forked["position"] == crew.position(5)
        crew.together()
        client.control("close", handles=[5])
        crew.bind(5)
        crew.together()

        before = crew.ids[4]
        client.control("detach", handles=[4])
        where = crew.position(4)
        crew.bind(4)
        crew.step(said=False)
        crew.together()
        assert rest.get(f"/{before}").json()["position"] == where
        right()

        other = dial(running=any_server)
        other.open({"handle": 9, "session_id": crew.ids[0], "mode": "resume"})
        x = crew.steps()
        crew.took(0, x, other.step((9, crew.position(0), x))[9])
        crew.together()
        right()


def test_the_largest_frame(dial: Dial, oracle: Oracles, rng: np.random.Generator):
    client = dial()
    for first in range(0, 4096, 1024):
        client.bind(*range(first, first + 1024))
    x = rng.standard_normal((4096, 1, 3)).astype("<f4")
    answers = client.step(*[(handle, 0, x[handle]) for handle in range(4096)])
    for handle in range(0, 4096, 97):
        assert np.array_equal(answers[handle].outputs[0], oracle("lstm")(x[handle]))
    assert client.control("close", handles=list(range(4096)))["sessions"][5] == {"handle": 5, "position": 1}


def test_a_session_twice_in_a_frame(dial: Dial, oracle: Oracles, x: np.ndarray):
    """In the entries' order, if the session was opened for as many chunks at once."""
    client = dial()
    client.bind(0, depth=3)
    client.bind(1)
    client.socket.send(frame((0, 0, x[:2]), (1, 0, x[:2]), (0, 2, x[2:4]), (0, None, x[4:6])))
    good, _ = client.receive(4)
    ours = sorted((reply for reply in good if reply.handle == 0), key=lambda reply: reply.position)
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in ours]), oracle("lstm")(x[:6]))


def test_rest_and_stream_share_sessions(dial: Dial, client: httpx.Client, oracle: Oracles, x: np.ndarray):
    ours = dial()
    (name,) = ours.bind(0)
    path = f"/v1/models/lstm/sessions/{name}"
    first = ours.step((0, 0, x[:4]))[0].outputs[0]
    answer = client.post(f"{path}/steps", content=x[4:8].tobytes(), headers=RAW)
    assert answer.headers["unroll-position"] == "8"
    last = ours.step((0, 8, x[8:]))[0].outputs[0]
    between = np.frombuffer(answer.content, "<f4").reshape(-1, 2)
    assert np.array_equal(np.concatenate([first, between, last]), oracle("lstm")(x))
    again = client.post(f"{path}/steps", content=x[8:].tobytes(), headers={**RAW, "Unroll-Position": "8"})
    assert again.content == last.tobytes()


# ── positions ────────────────────────────────────────────────────────────────────────────────────


def test_a_retry_gets_the_same_bytes(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    """Alone, among others, and from another connection."""
    client = dial(running=any_server)
    names = client.bind(0, 1, 2)
    first = client.step((0, 0, x[:3]), (1, 0, x[3:6]), (2, 0, x[:1]))
    again = client.step((1, 0, x[3:6]), (2, 1, x[1:2]), (0, 0, x[:3]))
    for handle in (0, 1):
        assert (again[handle].position, again[handle].content) == (3, first[handle].content)
    assert np.array_equal(again[2].outputs[0], oracle("lstm")(x[:2])[1:])
    other = dial(running=any_server)
    other.open({"handle": 7, "session_id": names[0], "mode": "resume"})
    for _ in range(2):
        reply = other.step((7, 0, x[:3]))[7]
        assert (reply.position, reply.content) == (3, first[0].content)
    assert np.array_equal(other.step((7, 3, x[3:]))[7].outputs[0], oracle("lstm")(x)[3:])


@pytest.mark.parametrize("steps", [1, 2])
def test_refusals_by_position(dial: Dial, client: httpx.Client, oracle: Oracles, x: np.ndarray, steps: int):
    ours = dial()
    (name,) = ours.bind(0)
    state = f"/v1/models/lstm/sessions/{name}/state"
    for at in range(0, 3 * steps, steps):
        ours.step((0, at, x[at : at + steps]))
    end, before = 3 * steps, client.get(state).content
    for position, sent, code in [
        (end + 1, x[:1], "position_gap"),
        (2**63, x[:1], "position_gap"),
        (end - 2 * steps, x[end - 2 * steps : end - steps], "position_too_old"),
        (end - steps, x[:steps], "payload_mismatch"),
        (end - steps, x[end - steps : end + 1], "payload_mismatch"),
    ]:
        found, error = ours.refused(0, position, sent)
        assert (found, error["expected"]) == (code, end)
    assert client.get(state).content == before
    assert np.array_equal(ours.step((0, end, x[end:]))[0].outputs[0], oracle("lstm")(x)[end:])


def test_refusals_do_not_touch_their_neighbours(dial: Dial, oracle: Oracles, x: np.ndarray):
    client = dial("lstm")
    client.bind(*range(6))
    client.step(*[(handle, 0, x[:2]) for handle in range(6)])
    nan = x[2:4].copy()
    nan[1, 2] = np.nan
    client.socket.send(
        frame(
            (0, 2, x[2:4]), (1, 9, x[2:4]), (2, 2, nan), (3, 0, x[:2]), (4, 0, x[2:4]), (99, 2, x[2:4]), (5, 2, x[2:4])
        )
    )
    good, bad = client.receive(7)
    assert {reply.handle: reply.position for reply in good} == {0: 4, 3: 2, 5: 4}
    assert {(error["handle"], error["position"], error["code"]) for error in bad} == {
        (1, 9, "position_gap"),
        (2, 2, "non_finite_input"),
        (4, 0, "payload_mismatch"),
        (99, 2, "malformed_request"),
    }
    after = client.step(*[(handle, None, x[2:4]) for handle in (1, 2, 3, 4)])
    for reply in (*after.values(), *[reply for reply in good if reply.handle != 3]):
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[:4])[2:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_fails_alone(dial: Dial, oracle: Oracles, rng: np.random.Generator, bad: float):
    client = dial()
    client.bind(*range(20))
    x = rng.standard_normal((20, 1, 3)).astype("<f4")
    sent = x.copy()
    sent[7, 0, 1] = bad
    client.socket.send(frame(*[(handle, 0, sent[handle]) for handle in range(20)]))
    good, (error,) = client.receive(20)
    assert (error["handle"], error["position"], error["code"]) == (7, 0, "non_finite_input")
    for reply in (*good, client.step((7, 0, x[7]))[7]):
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[reply.handle]))


def test_an_answer_that_is_not_finite_fails_alone(dial: Dial, oracle: Oracles, rng: np.random.Generator):
    client = dial("hot")
    client.bind(*range(5))
    x = rng.standard_normal((5, 1, 3)).astype("<f4")
    sent = x.copy()
    sent[3] = 3e38
    said = {3: 0}
    client.socket.send(frame((99, 7, x[0]), *[(handle, said.get(handle), sent[handle]) for handle in range(5)]))
    good, (unbound, error) = client.receive(6)
    assert (unbound["handle"], unbound["position"]) == (99, 7)
    assert (error["handle"], error["position"], error["code"]) == (3, 0, "non_finite_output")
    assert client.refused(3, 0, sent[3])[0] == "non_finite_output"
    for reply in (*good, client.step((3, 0, x[3]))[3]):
        assert np.array_equal(reply.outputs[0], oracle("hot")(x[reply.handle]))


def test_tokens_out_of_range(dial: Dial):
    client = dial("tokens")
    client.bind(0, 1)
    assert client.refused(0, 0, np.array([11], "<i8"))[0] == "input_out_of_range"
    client.socket.send(frame((0, 0, np.array([-1], "<i8")), (1, 0, np.array([10], "<i8"))))
    good, (error,) = client.receive(2)
    assert (error["handle"], error["code"], good[0].handle) == (0, "input_out_of_range", 1)


def test_too_many_steps(serve: Serve, dial: Dial, x: np.ndarray):
    client = dial(running=serve(max_steps=3))
    client.bind(0, 1, 2)
    assert client.refused(0, 0, x[:4])[0] == "invalid_shape"
    client.socket.send(frame((0, 0, x[:4]), (1, 0, x[:3])))
    good, (error,) = client.receive(2)
    assert (error["handle"], error["code"], good[0].handle) == (0, "invalid_shape", 1)


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────


def test_modes(dial: Dial, client: httpx.Client, x: np.ndarray):
    ours = dial()
    name, closed = f"mode-{next(_ids)}", f"mode-{next(_ids)}"

    def opened(handle: int, **wanted: object) -> str | int:
        """The code of the error, or the position."""
        (item,) = ours.open({"handle": handle, **wanted})
        return item["error"]["code"] if "error" in item else item["position"]

    assert opened(0, session_id=name, mode="resume") == "session_unknown"
    assert opened(0, session_id=name, mode="either") == 0
    ours.step((0, 0, x[:2]))
    assert opened(1, session_id=name) == "session_exists"
    assert opened(1, session_id=name, mode="either") == 2
    assert opened(2, session_id=name, mode="resume") == 2
    assert ours.step((1, 2, x[2:4]))[1].content == ours.step((2, 2, x[2:4]))[2].content

    assert opened(3, session_id=closed) == 0
    ours.step((3, 0, x[:2]))
    client.delete(f"/v1/models/lstm/sessions/{closed}").raise_for_status()
    assert opened(4, session_id=closed, mode="resume") == "session_closed"
    assert opened(4, session_id=closed, mode="either") == "session_closed"
    assert opened(4, session_id=closed, mode="new") == 0  # who says so may start over

    assert opened(0) == "malformed_request"  # bound
    assert opened(5, mode="resume") == "malformed_request"
    assert opened(5, session_id="no/slash") == "malformed_request"
    assert opened(5, session_id="no/slash", mode="resume") == "malformed_request"
    assert opened(5, session_id=None, mode="either") == 0
    assert ours.open({"handle": 6}, {"handle": 6})[1]["error"]["code"] == "malformed_request"


def test_what_is_told_of_an_opened_session(dial: Dial, x: np.ndarray):
    client = dial("gru", model="gru:1")
    name = f"told-{next(_ids)}"
    assert client.open({"handle": 3, "session_id": name}) == [
        {"handle": 3, "session_id": name, "position": 0, "model_version": "1", "durability": "memory"}
    ]
    client.step((3, 0, x))
    error = client.open({"handle": 4, "session_id": name})[0]["error"]
    assert (error["code"], error["position"]) == ("session_exists", 12)
    made = client.bind(5, 6)
    assert len(set(made)) == 2
    assert all(len(session_id) >= 22 for session_id in made)


def test_close_ends_and_detach_does_not(dial: Dial, client: httpx.Client, x: np.ndarray):
    ours = dial()
    ids = ours.bind(0, 1, 2)
    ours.step(*[(handle, 0, x[:2]) for handle in range(3)])
    assert ours.control("detach", handles=[0, 1]) == {"op": "detached", "handles": [0, 1]}
    assert ours.refused(0, 2, x[:1])[0] == "malformed_request"
    assert client.get(f"/v1/models/lstm/sessions/{ids[0]}").json()["position"] == 2
    assert ours.open({"handle": 0, "session_id": ids[1], "mode": "resume"})[0]["position"] == 2
    answer = ours.control("close", handles=[0, 2, 5, 2])
    assert answer["op"] == "closed"
    assert answer["sessions"][:2] == [{"handle": 0, "position": 2}, {"handle": 2, "position": 2}]
    assert [item["error"]["code"] for item in answer["sessions"][2:]] == ["malformed_request"] * 2
    assert client.get(f"/v1/models/lstm/sessions/{ids[1]}").status_code == 410
    assert client.get(f"/v1/models/lstm/sessions/{ids[0]}").status_code == 200
    error = ours.control("detach", handles=[1, 0])
    assert (error["op"], error["code"], error["handle"]) == ("error", "malformed_request", 1)


def test_a_session_that_ends_elsewhere(dial: Dial, client: httpx.Client, x: np.ndarray):
    """The handle means the session it was bound to, and not the next one of that id."""
    ours = dial()
    ids = ours.bind(0, 1)
    ours.step((0, 0, x[:1]), (1, 0, x[:1]))
    path = f"/v1/models/lstm/sessions/{ids[0]}"
    client.delete(path).raise_for_status()
    assert ours.refused(0, 1, x[1:2])[0] == "session_closed"
    ours.socket.send(frame((0, None, x[1:2]), (1, 1, x[1:2])))
    good, (error,) = ours.receive(2)
    assert (good[0].handle, error["handle"], error["code"]) == (1, 0, "session_closed")

    client.post("/v1/models/lstm/sessions", json={"session_id": ids[0]}).raise_for_status()
    assert ours.refused(0, None, x[1:2])[0] == "session_closed"
    assert ours.refused(0, 0, x[1:2])[0] == "session_closed"
    assert ours.control("close", handles=[0])["sessions"][0]["error"]["code"] == "session_closed"
    assert client.get(path).json()["position"] == 0
    ours.bind(0)  # the handle is free


def test_expired_and_evicted(serve: Serve, dial: Dial, x: np.ndarray):
    clock = ManualClock()
    running = serve(clock, session_capacity=2, idle_timeout=100.0, spill_bytes=0)
    client = dial(running=running)
    a, _ = client.bind(0, 1)
    clock.advance(1)
    client.step((1, 0, x[:1]))
    client.bind(2)
    assert client.refused(0, 0, x[:1])[0] == "session_evicted"
    clock.advance(100)
    assert client.refused(1, 1, x[:1])[0] == "session_expired"
    assert client.refused(2, None, x[:1])[0] == "session_expired"
    (item,) = client.open({"handle": 9, "session_id": a, "mode": "either"})
    assert item["error"]["code"] == "session_evicted"


def test_versions_on_one_connection(dial: Dial, client: httpx.Client, oracle: Oracles, x: np.ndarray):
    """A session stays on the version it began on; a frame may hold sessions of several."""
    old = client.post("/v1/models/gru:1/sessions").json()["session_id"]
    ours = dial("gru")
    resumed, new = ours.open({"handle": 0, "session_id": old, "mode": "resume"}, {"handle": 1})
    assert (resumed["model_version"], new["model_version"]) == ("1", "2")
    for at in (0, 6):
        answers = ours.step((0, at, x[at : at + 6]), (1, at, x[at : at + 6]))
        for handle, version in ((0, "1"), (1, "2")):
            assert np.array_equal(answers[handle].outputs[0], oracle("gru", version)(x)[at : at + 6])
    second = dial("gru", model="gru:2")
    assert second.open({"handle": 0, "session_id": old, "mode": "either"})[0]["error"]["code"] == "model_changed"


def test_versions_that_take_other_inputs(serve: Serve, dial: Dial, repository: Path, tmp_path: Path):
    """`gru` version 2 is another model altogether: its sessions do not fit the frames of version 1."""
    shutil.copytree(repository / "gru" / "1", tmp_path / "gru" / "1")
    running = serve(repository=tmp_path)
    client = dial("gru", running=running)
    (old,) = client.bind(0)
    manifest = json.loads((repository / "tokens" / "1" / "manifest.json").read_bytes())
    shutil.copytree(repository / "tokens" / "1", tmp_path / "gru" / "2")
    (tmp_path / "gru" / "2" / "manifest.json").write_text(json.dumps({**manifest, "name": "gru", "version": "2"}))
    running.rescan_now()
    (item,) = client.open({"handle": 1})
    assert item["error"]["code"] == "model_changed"
    assert "gru:2" in item["error"]["detail"]
    newer = dial("gru", running=running)
    (item,) = newer.open({"handle": 0, "session_id": old, "mode": "resume"})
    assert item["error"]["code"] == "model_changed"
    newer.bind(0)


# ── losing the connection ────────────────────────────────────────────────────────────────────────


def test_replies_that_were_lost_are_given_again(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    """Four chunks are applied, nobody reads their answers, and the connection breaks."""
    first = dial(running=any_server)
    (name,) = first.bind(0, depth=4)
    for at in range(0, 8, 2):
        first.socket.send(frame((0, at, x[at : at + 2])))
    session = any_server.model("lstm").scheduler.sessions.find_detached(name, 0.0)
    until(lambda: session.position == 8)
    first.abort()
    client = dial(running=any_server)
    (resumed,) = client.open({"handle": 5, "session_id": name, "mode": "resume", "depth": 4})
    assert resumed["position"] == 8
    for at in range(0, 12, 2):
        client.socket.send(frame((5, at, x[at : at + 2])))
    good, _ = client.receive(6)
    assert [reply.position for reply in good] == [2, 4, 6, 8, 10, 12]
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x))


def test_more_replies_than_are_kept(dial: Dial, x: np.ndarray):
    client = dial()
    client.bind(0, depth=2)
    for at in range(0, 6, 2):
        client.step((0, at, x[at : at + 2]))
    assert client.refused(0, 0, x[:2])[0] == "position_too_old"
    assert client.step((0, 2, x[2:4]))[0].position == 4
    assert client.step((0, 4, x[4:6]))[0].position == 6


def test_chunks_that_waited_are_dropped_with_their_connection(
    any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray
):
    """One was running, two waited: sent again, each is applied once."""
    first = dial(running=any_server)
    (name,) = first.bind(0, depth=3)
    (stream,) = any_server.server.streams
    with any_server.holding("lstm") as held:
        for at in range(0, 6, 2):
            first.socket.send(frame((0, at, x[at : at + 2])))
        held.wait()
        until(lambda: "3 entries" in repr(stream))
        first.abort()
        until(lambda: not any_server.server.streams)
        assert any_server.model("lstm").scheduler.in_flight == 1
        client = dial(running=any_server)
        (resumed,) = client.open({"handle": 0, "session_id": name, "mode": "resume", "depth": 3})
        assert resumed["position"] == 0
        for at in range(0, 6, 2):
            client.socket.send(frame((0, at, x[at : at + 2])))
    good, bad = client.receive(3)
    assert not bad
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x[:6]))


def test_a_frame_that_was_running(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    """Its sessions are resumed while the batch has not been committed: the retries are answered by it."""
    first = dial(running=any_server)
    names = first.bind(*range(30))
    x = rng.standard_normal((30, 1, 3)).astype("<f4")
    with any_server.holding("lstm") as held:
        first.socket.send(frame(*[(handle, 0, x[handle]) for handle in range(30)]))
        held.wait()
        first.abort()
        until(lambda: not any_server.server.streams)
        client = dial(running=any_server)
        client.open(*[{"handle": i, "session_id": name, "mode": "resume"} for i, name in enumerate(names)])
        client.socket.send(frame(*[(handle, 0, x[handle]) for handle in range(30)]))
    good, bad = client.receive(30)
    assert not bad
    for reply in good:
        assert reply.position == 1
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[reply.handle]))


def test_pipelining(any_server: Running, dial: Dial, oracle: Oracles, x: np.ndarray):
    """As many chunks as the session was opened for wait; one more is refused, and those behind it do not fit."""
    client = dial(running=any_server)
    client.bind(0, depth=3)
    (stream,) = any_server.server.streams
    with any_server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:2])))
        held.wait()
        for at in range(2, 10, 2):
            client.socket.send(frame((0, at, x[at : at + 2])))
        until(lambda: "3 entries" in repr(stream))
        _, errors = client.receive(2)
    assert [(error["position"], error["code"]) for error in errors] == [(6, "queue_full"), (8, "position_gap")]
    assert errors[0]["retry_after"] >= 0
    good, _ = client.receive(3)
    assert np.array_equal(np.concatenate([reply.outputs[0] for reply in good]), oracle("lstm")(x[:6]))
    assert client.step((0, 6, x[6:8]))[0].position == 8


def test_a_retry_of_what_is_running_is_no_new_chunk(dial: Dial, server: Running, x: np.ndarray):
    client = dial()
    client.bind(0)
    (stream,) = server.server.streams
    with server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:2])))
        held.wait()
        client.socket.send(frame((0, 0, x[:2])))
        until(lambda: "2 entries" in repr(stream))
    good, _ = client.receive(2)
    assert {(reply.position, reply.content) for reply in good} == {(2, good[0].content)}


def test_closing_while_a_chunk_runs(dial: Dial, server: Running, oracle: Oracles, x: np.ndarray):
    """What runs is finished and answered, what waits fails."""
    client = dial()
    client.bind(0, depth=2)
    with server.holding("lstm") as held:
        client.socket.send(frame((0, 0, x[:2])))
        held.wait()
        client.socket.send(frame((0, 2, x[2:4])))
        client.socket.send(json.dumps({"op": "close", "handles": [0]}))
        messages = [json.loads(client.socket.recv(PATIENCE)) for _ in range(2)]
    codes = {message["op"]: message.get("code") for message in messages}
    assert codes == {"error": "session_closed", "closed": None}
    (reply,), _ = client.receive(1)
    assert np.array_equal(reply.outputs[0], oracle("lstm")(x[:2]))


# ── the server goes ──────────────────────────────────────────────────────────────────────────────


def last_messages(client: Client) -> list[str | bytes]:
    """What still comes before the server hangs up."""
    messages: list[str | bytes] = []
    try:
        while True:
            messages.append(client.socket.recv(PATIENCE))
    except ConnectionClosed as closed:
        assert closed.rcvd
        assert closed.rcvd.code == 1012
        assert closed.rcvd.reason
    return messages


def farewell(client: Client) -> dict[int, dict]:
    """What the server says of each handle before it hangs up, and nothing else."""
    told: dict[int, dict] = {}
    for message in last_messages(client):
        text = json.loads(message)
        assert text["op"] == "closing"
        assert 1 <= len(text["sessions"]) <= SLICE
        told |= {item["handle"]: item for item in text["sessions"]}
    return told


def test_a_stream_is_told_where_to_go_on(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    number = 2 * SLICE + 1
    x = rng.standard_normal((number, 9, 3)).astype("<f4")
    client = dial(running=any_server)
    ids = client.bind(*range(number))
    for position in range(3):
        client.step(*[(i, position, x[i, position : position + 1]) for i in range(number)])
    client.step((1, 3, x[1, 3:5]))
    client.control("detach", handles=[0])
    for served in any_server.server.streams:
        any_server.uvicorn.loop.call_soon_threadsafe(served.drain)
    told = farewell(client)
    expected = {i: {"handle": i, "session_id": ids[i], "position": 5 if i == 1 else 3} for i in range(1, number)}
    assert told == expected
    other = dial(running=any_server)
    other.open(*[{"handle": i, "session_id": each["session_id"], "mode": "resume"} for i, each in told.items()])
    went_on = other.step(*[(i, each["position"], x[i, each["position"] :]) for i, each in told.items()])
    for i in (1, 2, number - 1):
        assert np.array_equal(went_on[i].outputs[0], oracle("lstm")(x[i])[expected[i]["position"] :])


@pytest.mark.parametrize("kind", [Running, Plain])
def test_what_is_owed_leaves_before_the_server_goes(
    repository: Path, dial: Dial, background: Background, kind: type[Running], x: np.ndarray
):
    """Whatever the client still sends: it has the outputs of exactly those steps that it is told were applied."""
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


def test_the_server_goes(serve: Serve, dial: Dial, x: np.ndarray):
    running = serve()
    client = dial(running=running)
    (session_id,) = client.bind(0)
    client.bind(1)
    client.step((0, 0, x))
    running.stop()
    told = farewell(client)
    assert told[0] == {"handle": 0, "session_id": session_id, "position": len(x)}
    assert told[1]["position"] == 0
    assert not running.server.streams


def test_a_session_that_is_gone_when_the_server_goes(serve: Serve, dial: Dial):
    running = serve()
    client = dial(running=running)
    (session_id,) = client.bind(0)
    httpx.delete(f"{running.url}/v1/models/lstm/sessions/{session_id}").raise_for_status()
    running.stop()
    told = farewell(client)
    assert told[0]["error"]["code"] == "session_closed"


# ── the way in ───────────────────────────────────────────────────────────────────────────────────


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


def test_a_refusal_is_not_logged_as_a_fault(
    server: Running, dial: Dial, client: httpx.Client, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(InvalidStatus):
        dial(model="nobody")
    assert client.get("/livez").status_code == 200  # by now the application has returned
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_pages_of_other_origins(any_server: Running, dial: Dial):
    """A browser says which page asks; only the server's own may. Who says nothing is no browser."""
    dial(running=any_server, origin=f"http://{any_server.address}")
    for origin in ("http://evil.example", "null", "http://[", f"http://{any_server.address}.evil.example"):
        with pytest.raises(InvalidStatus) as refusal:
            dial(running=any_server, origin=origin)
        assert refusal.value.response.status_code == 403


async def test_a_server_without_http_answers(server: Running):
    """It can only close the connection: the code says why."""
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


# ── hostile ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("message", "handle"),
    [
        ("", None),
        ("{", None),
        ("[]", None),
        ("null", None),
        ("{}", None),
        ('{"op": "reset"}', None),
        ('{"op": 7}', None),
        ('{"op": "open"}', None),
        ('{"op": "open", "sessions": []}', None),
        ('{"op": "open", "sessions": {}}', None),
        ('{"op": "open", "sessions": [7]}', None),
        ('{"op": "open", "sessions": [{}]}', None),
        ('{"op": "open", "sessions": [{"handle": -1}]}', None),
        ('{"op": "open", "sessions": [{"handle": 4294967296}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1.0}]}', None),
        ('{"op": "open", "sessions": [{"handle": true}]}', None),
        ('{"op": "open", "sessions": [{"handle": "1"}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1e999}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "depth": 0}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "depth": 65}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "mode": "old"}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "session_id": 5}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "position": 5}]}', None),
        ('{"op": "open", "sessions": [{"handle": 1}], "more": 1}', None),
        ('{"op": "open", "sessions": [{"handle": 1, "session_id": "\\ud800"}]}', None),
        ('{"op": "close", "handles": []}', None),
        ('{"op": "close", "handles": [null]}', None),
        ('{"op": "detach", "handles": [77]}', 77),
        ('{"op": "close", "handles": ' + "[" * 100_000 + "]" * 100_000 + "}", None),
    ],
)
def test_text_that_is_no_request(dial: Dial, message: str, handle: int | None):
    client = dial()
    client.socket.send(message)
    _, (error,) = client.receive(1)
    assert error["code"] == "malformed_request"
    assert error.get("handle") == handle
    client.bind(1)  # nothing was done, and the connection is as good as before


def test_messages_that_are_too_large(serve: Serve, dial: Dial, x: np.ndarray):
    running = serve(max_json_bytes=200, max_body_bytes=1000)
    client = dial(running=running)
    client.socket.send(" " * 201)
    _, (error,) = client.receive(1)
    assert error["code"] == "body_too_large"
    client.bind(0)
    client.socket.send(bytes(1001))
    with pytest.raises(ConnectionClosed) as closed:
        client.receive(1)
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1009


def test_a_large_message_where_the_transport_lets_it_pass(repository: Path, dial: Dial):
    running = Plain(Settings(repository=repository, max_body_bytes=1000))
    try:
        client = dial(running=running)
        client.socket.send(bytes(1001))
        _, (error,) = client.receive(1)
        assert error["code"] == "body_too_large"
    finally:
        running.stop()


#: A frame for handles 1 and 2 of a model with three features, and what may become of it under way.
_SOUND = frame((1, 0, np.ones((2, 3), "<f4")), (2, None, np.ones((1, 3), "<f4")))
_DAMAGED = st.one_of(
    st.binary(max_size=100),
    st.integers(0, len(_SOUND)).map(lambda end: _SOUND[:end]),
    st.binary(min_size=1, max_size=40).map(lambda more: _SOUND + more),
    st.tuples(st.integers(0, 39), st.binary(min_size=1, max_size=8)).map(
        lambda cut: _SOUND[: cut[0]] + cut[1] + _SOUND[cut[0] + len(cut[1]) :]
    ),
    st.integers(0, 2**32 - 1).map(lambda number: _SOUND[:4] + struct.pack("<I", number) + _SOUND[8:]),
)


def test_any_frame_is_answered(any_server: Running, dial: Dial):
    """By outputs or by errors; the connection and the server go on."""
    client = dial(running=any_server)
    client.bind(1, 2)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(_DAMAGED)
    def send(content: bytes) -> None:
        client.socket.send(content)
        client.socket.send(json.dumps({"op": "detach", "handles": [NOBODY]}))
        while True:
            message = client.socket.recv(PATIENCE)
            if isinstance(message, bytes):
                replies(client.manifest, message)
                continue
            error = json.loads(message)
            if error.get("handle") == NOBODY and "position" not in error:
                break
            assert error["code"] in ("malformed_request", "position_gap", "position_too_old", "payload_mismatch",
                                     "non_finite_input", "queue_full")  # fmt: skip

    send()
    client.socket.send(json.dumps({"op": "open", "sessions": [{"handle": 3}]}))
    while isinstance(message := client.socket.recv(PATIENCE), bytes):  # outputs of the last examples
        replies(client.manifest, message)
    assert json.loads(message)["op"] == "opened"


# ── back-pressure ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [Running, Plain])
def test_a_client_that_does_not_read(
    repository: Path,
    dial: Dial,
    background: Background,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Running],
    x: np.ndarray,
):
    """It is read from no more and then cut off, while its sessions live on; others feel nothing."""
    monkeypatch.setattr(stream, "router", partial(stream.router, stalled_seconds=0.5))
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
        (resumed,) = other.open({"handle": 1, "session_id": names[0], "mode": "resume"})
        assert resumed["position"] > 0
        assert other.step((1, None, x))[1].steps == 12
    finally:
        hang_up(deaf)
        running.stop()


def hang_up(connection: socket.socket) -> None:
    """Also for who waits to write to it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Wire:
    """A Stream without any network."""

    stream: Stream
    server: Server
    manifest: Manifest
    sent: list[bytes | dict]
    flow: list[str]
    engine: HeldEngine

    def frame(self, handles: range, steps: int = 1) -> None:
        self.stream.on_binary(frame(*[(handle, None, np.ones((steps, 3), "<f4")) for handle in handles]))

    async def bind(self, number: int, **options: object) -> None:
        wanted = [{"handle": handle, **options} for handle in range(number)]
        self.stream.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
        await soon(lambda: self.sent)
        self.flow.clear()
        opened = self.sent.pop()
        assert isinstance(opened, dict)
        assert not [item for item in opened["sessions"] if "error" in item]

    def answered(self) -> list[Reply]:
        return [r for message in self.sent if isinstance(message, bytes) for r in replies(self.manifest, message)]


async def soon(condition: Callable[[], object]) -> None:
    """Returns when the event loop has made the condition true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 there is nothing to wait for but turns of the loop
            await asyncio.sleep(0)


@pytest.fixture
async def wire(repository: Path, tmp_path: Path) -> AsyncIterator[Wire]:
    shutil.copytree(repository / "lstm", tmp_path / "lstm")
    _, server = app.build(Settings(repository=tmp_path))
    (model,) = server.catalog
    running = asyncio.create_task(server.catalog.run())
    sent: list[bytes | dict] = []
    flow: list[str] = []
    made = Stream(
        server,
        "lstm",
        sent.append,
        lambda text: sent.append(json.loads(text)),
        lambda: flow.append("pause"),
        lambda: flow.append("resume"),
        later=asyncio.get_running_loop().call_soon,
        hang_up=lambda code, reason: sent.append({"op": "hung up", "code": code}),
    )
    assert server.streams == {made}
    with HeldEngine(model.loop) as engine:
        yield Wire(made, server, model.manifest, sent, flow, engine)
        made.close()
        assert not server.streams
    await soon(lambda: not model.scheduler.in_flight)
    model.scheduler.check_invariants()
    running.cancel()
    await asyncio.wait([running])


async def test_the_window(wire: Wire):
    """More unanswered entries than that, and no more is read until answers have left."""
    await wire.bind(WINDOW + 1)
    wire.frame(range(WINDOW))
    assert wire.flow == []
    wire.frame(range(WINDOW, WINDOW + 1))
    assert wire.flow == ["pause"]
    assert f"{WINDOW + 1} entries" in repr(wire.stream)
    wire.engine.release()
    await soon(lambda: len(wire.answered()) == WINDOW + 1)
    assert wire.flow == ["pause", "resume"]
    assert "open, 2049 sessions, 0 entries" in repr(wire.stream)


async def test_the_window_in_bytes(wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """Few entries may have large answers."""
    monkeypatch.setattr(stream, "WINDOW_BYTES", 4096)
    await wire.bind(3)
    steps = 4096 // sum(spec.nbytes for spec in wire.manifest.outputs) // 2
    wire.frame(range(2), steps)
    assert wire.flow == []
    wire.frame(range(2, 3))
    assert wire.flow == ["pause"]
    wire.frame(range(3, 4), steps)  # refused, which is an answer: no such handle
    wire.stream.on_binary(frame((2, 99, np.ones((7, 3), "<f4")), (0, 99, np.ones((9, 3), "<f4"))))
    wire.engine.release()
    await soon(lambda: len(wire.answered()) == 3)
    assert wire.flow == ["pause", "resume"]
    wire.frame(range(2), steps)
    assert wire.flow == ["pause", "resume"]
    wire.frame(range(2, 3))
    assert wire.flow == ["pause", "resume", "pause"]


async def test_not_read_while_the_client_does_not_read(wire: Wire):
    wire.stream.on_writable(False)
    wire.stream.on_writable(False)
    assert wire.flow == ["pause"]
    assert "paused" in repr(wire.stream)
    wire.stream.on_writable(True)
    assert wire.flow == ["pause", "resume"]


async def test_both_reasons_to_pause_must_end(wire: Wire):
    await wire.bind(WINDOW + 1)
    wire.frame(range(WINDOW + 1))
    wire.stream.on_writable(False)
    wire.engine.release()
    await soon(lambda: len(wire.answered()) == WINDOW + 1)
    assert wire.flow == ["pause"]
    wire.stream.on_writable(True)
    assert wire.flow == ["pause", "resume"]


async def test_errors_are_answers_too(wire: Wire):
    await wire.bind(2)
    wire.frame(range(2, 10))
    assert [message["handle"] for message in wire.sent if isinstance(message, dict)] == list(range(2, 10))
    assert "0 entries" in repr(wire.stream)


async def test_a_frame_is_answered_by_few(wire: Wire):
    """Sessions that are idle by one frame; those that were busy, and so were queued one by one, by another."""
    await wire.bind(100, depth=2)
    wire.frame(range(50))
    wire.frame(range(100))
    wire.engine.release()
    await soon(lambda: len(wire.answered()) == 150)
    assert len(wire.sent) <= 4
    frames = [replies(wire.manifest, message) for message in wire.sent if isinstance(message, bytes)]
    assert {reply.position for reply in frames[0]} == {1}


async def test_nothing_is_sent_to_a_connection_that_is_gone(wire: Wire):
    await wire.bind(4, depth=2)
    wire.frame(range(4))
    wire.frame(range(2))
    wire.frame(range(3, 4), steps=200)
    (model,) = wire.stream._server.catalog
    await soon(lambda: wire.engine.reached.is_set())
    assert model.scheduler.in_flight == 7
    wire.stream.close()
    assert model.scheduler.in_flight == 4  # what runs, runs; what waits is dropped
    wire.engine.release()
    await soon(lambda: not model.scheduler.in_flight)
    assert wire.sent == []
    assert sum(session.position for session in model.scheduler.sessions) == 4


async def test_opening_many_sessions_lets_others_have_their_turn(wire: Wire):
    """The rest is done when the event loop comes round; what came after it waits, in its order."""
    names = [f"many-{number}" for number in range(3 * SLICE)]
    wanted = [{"handle": handle, "session_id": name} for handle, name in enumerate(names)]
    wire.stream.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    wire.stream.on_text(json.dumps({"op": "close", "handles": [*range(1, 3 * SLICE)]}).encode())
    wire.frame(range(2))
    wire.stream.on_text(b'{"op": "detach", "handles": [0]}')
    assert (wire.flow, wire.sent) == (["pause"], [])
    assert f"{SLICE} sessions" in repr(wire.stream)
    await soon(lambda: len(wire.sent) == 4)
    opened, closed, refused, detached = wire.sent
    assert [item["session_id"] for item in opened["sessions"]] == names
    assert closed["sessions"] == [{"handle": handle, "position": 0} for handle in range(1, 3 * SLICE)]
    assert (refused["handle"], refused["code"], detached["op"]) == (1, "malformed_request", "detached")
    assert wire.flow[-1] == "resume"
    wire.engine.release()
    await soon(wire.answered)


async def test_many_messages_behind_one_that_takes_long(wire: Wire):
    wanted = [{"handle": handle} for handle in range(SLICE)]
    wire.stream.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    for _ in range(3000):
        wire.stream.on_text(b'{"op": "close", "handles": [7]}')
    await soon(lambda: len(wire.sent) == 3001)
    assert [message["op"] for message in wire.sent[:2]] == ["opened", "closed"]
    assert wire.flow == ["pause", "resume"]


async def test_a_connection_that_goes_while_it_opens_sessions(wire: Wire):
    wanted = [{"handle": handle} for handle in range(3 * SLICE)]
    wire.stream.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    wire.stream.close()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (wire.flow, wire.sent) == (["pause"], [])
    assert f"{SLICE} sessions" in repr(wire.stream)


async def test_too_many_sessions_for_one_connection(wire: Wire, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "MAX_HANDLES", 3)
    await wire.bind(3)
    wire.stream.on_text(b'{"op": "open", "sessions": [{"handle": 9}]}')
    (item,) = wire.sent[-1]["sessions"]
    assert item["error"]["code"] == "capacity_exhausted"
    assert item["error"]["retry_after"] > 0
    wire.stream.on_text(b'{"op": "detach", "handles": [1]}')
    wire.stream.on_text(b'{"op": "open", "sessions": [{"handle": 9}]}')
    assert "error" not in wire.sent[-1]["sessions"][0]


async def test_a_drain_waits_for_what_runs(wire: Wire):
    await wire.bind(SLICE + 1)
    wire.frame(range(SLICE + 1))
    await soon(wire.engine.reached.is_set)
    wire.stream.drain()
    wire.stream.drain()
    assert wire.flow == ["pause"]
    assert not wire.sent
    wire.engine.release()
    await soon(lambda: {"op": "hung up", "code": 1012} in wire.sent)
    assert len(wire.answered()) == SLICE + 1
    texts = [message for message in wire.sent if isinstance(message, dict)]
    assert [text["op"] for text in texts] == ["closing", "closing", "hung up"]
    assert [item["position"] for text in texts[:-1] for item in text["sessions"]] == [1] * (SLICE + 1)
    wire.frame(range(1))  # it was on its way
    wire.stream.on_text(b"{}")
    assert wire.sent[-1] == texts[-1]
    assert wire.flow == ["pause"]


async def test_a_drain_while_sessions_are_opened(wire: Wire):
    """Those opened so far can be resumed; the others are told to go elsewhere, as what waited behind them is."""
    wanted = [{"handle": handle} for handle in range(SLICE + 1)]
    wire.stream.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
    wire.stream.on_text(json.dumps({"op": "open", "sessions": [{"handle": 999}]}).encode())
    wire.frame(range(1))
    wire.server.drain()
    wire.stream.drain()
    wire.engine.release()
    await soon(lambda: {"op": "hung up", "code": 1012} in wire.sent)
    first, second, *closing, _ = [message for message in wire.sent if isinstance(message, dict)]
    assert [item.get("error", {}).get("code") for item in first["sessions"]] == [None] * SLICE + ["draining"]
    assert second["sessions"][0]["error"]["code"] == "draining"
    assert [reply.handle for reply in wire.answered()] == [0]
    assert [item["position"] for text in closing for item in text["sessions"]] == [1] + [0] * (SLICE - 1)
