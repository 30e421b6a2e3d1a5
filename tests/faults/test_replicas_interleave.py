"""A store reorders and delays calls and loses answers, yet its replicas apply each step at most once.

Each step has unique inputs, so the store's records show which steps were applied, in which order, and to which state.
"""

import asyncio
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
from faults.conftest import Servers
from faults.wires import HTTP_WAYS, Broken, Reply, Stream, Wires
from memory_store import MemoryStore
from oracle import Oracle

from unroll.service import app
from unroll.service.core.errors import StoreUnavailable, UnrollError
from unroll.service.scheduler.reply import payload_digest
from unroll.service.store.interface import Commit, Key
from unroll.service.store.record import Gone, Record

T = TypeVar("T")

_SESSIONS, _ACTORS, _ACTS = 5, 4, 25
#: Outcomes that leave open whether the step was applied.
_OPEN = {"store_unavailable", "broken"}
#: Events that must happen for the test to be meaningful.
_EVERYTHING = {"200", "store_unavailable", "position_gap", "position_too_old", "session_closed", "session_exists"}


class _AnyOrder(MemoryStore):
    """applied: Every committed record in order, by session."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.applied: dict[tuple[Key, bytes], list[Record]] = defaultdict(list)
        self.refused = 0
        self.loses = False
        self.looked_up: list[int] = []
        self._chance = chance
        self._lock = threading.Lock()  # each server has its own thread

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        try:
            return await self._do(lambda: [self._commit(commit) for commit in commits])
        except StoreUnavailable as error:
            return [error] * len(commits)

    async def load_all(self, keys: Sequence[Key]) -> list[Record | Gone | UnrollError | None]:
        self.looked_up.append(len(keys))
        return await self._do(lambda: [self._records.get(key) or self._gone.get(key, (None,))[0] for key in keys])

    async def close(self, key: Key, origin: bytes = b"") -> int | None:
        def close() -> int | None:
            record = self._records.get(key)
            if record is None or record.origin.to_bytes() != origin:
                return None
            del self._records[key]
            self._gone[key] = Gone("session_closed", record.origin), b""
            return record.position

        return await self._do(close)

    def _commit(self, commit: Commit) -> UnrollError | None:
        error = super()._commit(commit)
        record = Record.unpack(commit.content, commit.token)
        if error is None:
            self.applied[commit.key, record.origin.born].append(record)
        else:
            self.refused += 1
        return error

    async def _do(self, call: Callable[[], T]) -> T:
        with self._lock:
            before, after, lost = *(self._chance.choice((0, 0, 0.001, 0.004)) for _ in range(2)), self._chance.random()
        await asyncio.sleep(before)
        if self.loses and lost < 0.01:
            raise StoreUnavailable("as asked: it was not done", 0.01)
        with self._lock:
            result = call()
        await asyncio.sleep(after)
        if self.loses and lost > 0.99:
            raise StoreUnavailable("as asked: it was done", 0.01)
        return result


class _Actors:
    """Concurrent clients of one session. steps: Inputs and replies of each step, by digest."""

    def __init__(self, name: str, ports: Sequence[int], wires: Wires, chance: random.Random) -> None:
        self.steps: dict[bytes, tuple[np.ndarray, list[Reply]]] = {}
        self.outcomes: Counter[str] = Counter()
        self._name, self._ports, self._wires, self._chance = name, ports, wires, chance
        self._numbers = np.random.default_rng(chance.getrandbits(32))
        self._position = 0  # the last known position
        self._last: tuple[np.ndarray, int] | None = None

    async def live(self) -> None:
        acts = [self.step] * 10 + [self.twins] * 5 + [self.retry, self.stream] * 2 + [self.gap, self.save]
        acts += [self.end, self.close, self.fork]
        for _ in range(_ACTS):
            await self._chance.choice(acts)()

    async def open(self) -> None:
        if self._chance.random() < 0.5:
            await self._call("POST", "/sessions", {"session_id": self._name})
        else:
            await self._send(self._chunk(), 0, "v2", sequence_start=True)

    async def step(self) -> None:
        await self._send(self._chunk(), None, self._chance.choice(HTTP_WAYS))

    async def twins(self) -> None:
        """Send the same step at the same position to two servers at once."""
        x, position = self._chunk(), self._position
        await asyncio.gather(*(self._send(x, position, self._chance.choice(HTTP_WAYS)) for _ in "ab"))

    async def retry(self) -> None:
        if self._last is not None:
            await self._send(*self._last, self._chance.choice(HTTP_WAYS))

    async def gap(self) -> None:
        await self._send(self._chunk(), self._position + 50, "raw")

    async def stream(self) -> None:
        """Send several steps without waiting for replies."""
        chunks, position = [self._chunk() for _ in range(3)], self._chance.choice((None, self._position))
        stream = Stream(self._wires, self._chance.choice(self._ports), self._name, depth=3)
        try:
            replies = await stream.send_all(chunks, position)
        except Broken:
            replies = []
        finally:
            stream.close()
        if len(replies) < 3 or any(reply.code for reply in replies):  # a refusal does not wait for earlier replies
            replies = [Reply(0, code="broken")] * 3
        for x, reply in zip(chunks, replies, strict=True):
            self._note(x, reply)

    async def save(self) -> None:
        await self._call("GET", f"/sessions/{self._name}/state")

    async def end(self) -> None:
        await self._send(self._chunk(), None, "v2", sequence_end=True)
        await self.open()

    async def close(self) -> None:
        await self._call("DELETE", f"/sessions/{self._name}")
        await self.open()

    async def fork(self) -> None:
        """Fork to an id that other clients may open, step and close at the same time."""
        other = f"session-{self._chance.randrange(_SESSIONS)}"
        await self._call("POST", f"/sessions/{self._name}/fork", {"session_id": other})

    def _chunk(self) -> np.ndarray:
        return self._numbers.standard_normal((self._chance.choice((1, 1, 1, 3)), 2)).astype(np.float32)

    async def _send(self, x: np.ndarray, position: int | None, way: str, **flags: bool) -> None:
        port = self._chance.choice(self._ports)
        try:
            reply = await self._wires.send(way, port, self._name, x, position, **flags)
        except Broken:
            reply = Reply(0, code="broken")
        self._note(x, reply)
        if reply.status == 200 and position is not None and not flags:
            self._last = x, position

    def _note(self, x: np.ndarray, reply: Reply) -> None:
        self.steps.setdefault(payload_digest((x,)), (x, []))[1].append(reply)
        self.outcomes[reply.code or str(reply.status)] += 1
        self._position = reply.position if reply.status == 200 else reply.expected or self._position

    async def _call(self, method: str, path: str, body: object = None) -> Reply:
        reply = await self._wires.call(method, self._chance.choice(self._ports), path, body)
        self.outcomes[reply.code or str(reply.status)] += 1
        return reply


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))])
async def test_every_step_is_applied_once_or_never(
    servers: Servers, wires: Wires, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    store = _AnyOrder(chance)
    monkeypatch.setattr(app, "open_store", lambda config: store)
    cluster = await asyncio.to_thread(servers, 2, store="file:///not/used", session_capacity=4, piece_steps=2)
    ports = [server.port for server in cluster]
    crowd = [_Actors(f"session-{n}", ports, wires, chance) for n in range(_SESSIONS)]
    for actors in crowd:
        await actors.open()
    store.loses = True
    await asyncio.gather(*(actors.live() for actors in crowd for _ in range(_ACTORS)))

    steps = {digest: step for actors in crowd for digest, step in actors.steps.items()}
    applied: dict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
    for records in store.applied.values():
        own = [record.kept[-1].digest for record in records if record.kept]
        assert len(set(own)) == len(own), "a step was applied twice"
        for before, record in pairwise([None, *records]):
            assert record is not None
            if not record.kept:  # a record of the opening
                continue
            last = record.kept[-1]
            x, _ = steps[last.digest]
            state = None if before is None or not before.row else np.frombuffer(before.row, "<f4")
            (outputs, *_), row = oracle.all(x, state=state)
            assert (last.outputs, record.row) == (outputs.tobytes(), row.tobytes()), "the step ran on another state"
            assert record.position == (0 if before is None else before.position) + len(x)
            applied[last.digest].append((record.position, last.outputs))
    for digest, (_, replies) in steps.items():
        codes = {reply.code for reply in replies}
        assert {(reply.position, reply.outputs) for reply in replies if not reply.code} <= {*applied[digest]}
        assert len(applied[digest]) <= len(replies)
        assert not applied[digest] or codes & {"", *_OPEN}, f"the step was applied but refused: {codes}"
    outcomes = sum((actors.outcomes for actors in crowd), Counter[str]())
    assert outcomes.keys() >= _EVERYTHING, outcomes
    assert store.refused > 20, "too few commits were refused"
    assert max(store.looked_up) > 1, "no lookups were batched"
