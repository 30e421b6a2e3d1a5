"""Events in any order against the whole application: two replicas, one store, every route, restarts, lost writes.

A session is modelled by the list of its inputs, which the oracle runs with plain onnxruntime. Every reply must match
bit for bit, and every refusal must be the expected one. `make machine-test` runs more examples.
"""

import asyncio
import itertools
import os
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from faults.conftest import start_server
from faults.wires import WAYS, Reply, Stream, Wires
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from oracle import Oracle
from redis_server import RedisServer
from serving import Running
from waiting import until

from unroll.service.core.clock import ManualClock
from unroll.service.state.snapshot import Snapshot

EXAMPLES = int(os.environ.get("UNROLL_TEST_EXAMPLES", "4"))
CAPACITY, DEPTH = 3, 4
IDLE_SECONDS = 900.0
START, END = {"sequence_start": True}, {"sequence_end": True}

DURABLE, VOLATILE = ("d0", "d1", "d2", "d3"), ("m0", "m1")
IDS = st.sampled_from(DURABLE + DURABLE + VOLATILE)
REPLICAS = st.integers(0, 1)
CHUNKS = st.tuples(st.integers(1, 3), st.integers(0, 10**6)).map(
    lambda drawn: np.random.default_rng(drawn[1]).standard_normal((drawn[0], 2)).astype(np.float32)
)


@dataclass(frozen=True)
class Life:
    """An open session.

    number: Differs between sessions opened under one id. last: Position, inputs and outputs of the last chunk.
    """

    number: int
    chunks: tuple[np.ndarray, ...] = ()
    last: tuple[int, np.ndarray, bytes] | None = None

    @property
    def position(self) -> int:
        return sum(map(len, self.chunks))


@dataclass(frozen=True)
class Gone:
    """An ended or unknown session; requests must be refused with one of `codes`."""

    codes: frozenset[str] = frozenset({"session_unknown"})

    @classmethod
    def because(cls, *codes: str) -> "Gone":
        return cls(frozenset(codes))


class World:
    """Two replicas and their store, shared by all examples. Rules restart the replicas."""

    def __init__(self, repository: Path, redis: RedisServer, oracle: Oracle) -> None:
        self.repository, self.redis, self.oracle = repository, redis, oracle
        self.runner = asyncio.Runner()
        self.clocks = [ManualClock(), ManualClock()]
        self.servers = [self._start(clock) for clock in self.clocks]
        self.examples = itertools.count()

    def _start(self, clock: ManualClock) -> Running:
        limits = {"session_capacity": CAPACITY, "piece_steps": 2, "idle_timeout": IDLE_SECONDS}
        return start_server(self.repository, clock, store=self.redis.url, **limits)

    def restart(self, at: int) -> None:
        self.servers[at].stop()
        self.servers[at] = self._start(self.clocks[at])

    def end(self) -> None:
        for server in self.servers:
            server.stop()
        self.runner.close()


class AppMachine(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.prefix = f"{next(world.examples)}-"
        self.wires = Wires("tiny", ("x", "y"))
        self.lives: dict[str, Life | Gone] = {name: Gone() for name in DURABLE + VOLATILE}
        self.numbers = itertools.count()
        self.streams: dict[tuple[str, int], tuple[Stream, int]] = {}
        self.saved: dict[str, tuple[bytes, Life]] = {}
        self.dumped: dict[str, tuple[bytes, Life]] = {}

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def call(self, method: str, at: int, path: str, body: object = None) -> Reply:
        return self.run(self.wires.call(method, self.port(at), path, body))

    def send(self, name: str, at: int, way: str, x: np.ndarray, position: int | None) -> Reply:
        if way != "stream":
            return self.run(self.wires.send(way, self.port(at), self.prefix + name, x, position))
        life = self.lives[name]
        if (name, at) not in self.streams:
            number = life.number if isinstance(life, Life) else -1
            self.streams[name, at] = Stream(self.wires, self.port(at), self.prefix + name), number
        return self.run(self.streams[name, at][0].send(x, position))

    def run(self, asked: Coroutine[object, object, Reply]) -> Reply:
        return self.world.runner.run(asked)

    def port(self, at: int) -> int:
        return self.world.servers[at].port

    def path(self, name: str) -> str:
        return f"/sessions/{self.prefix}{name}"

    # ── expected answers ─────────────────────────────────────────────────────────────────────────

    def lives_at(self, name: str, at: int, reply: Reply) -> Life | None:
        """Return the session as the replica should see it, or None if it has none; the reply must then say so."""
        life = self.lives[name]
        if name in VOLATILE:
            if at != VOLATILE.index(name):
                life = Gone()
            elif reply.code == "session_evicted":
                life = self.lives[name] = Gone.because("session_evicted", "session_unknown")
        if isinstance(life, Life):
            return life
        assert reply.code in life.codes, (name, reply, life)
        return None

    def is_bound_to_another(self, name: str, at: int, way: str, reply: Reply) -> bool:
        """Return whether the stream reported the end of an earlier session of this id, to which its handle is bound."""
        life = self.lives[name]
        if way != "stream":
            return False
        stream, number = self.streams[name, at]
        if reply.status == 200 or not reply.code.startswith("session_"):
            return False
        stream.close()
        del self.streams[name, at]
        return not isinstance(life, Life) or number != life.number

    def refused(self, name: str, at: int, reply: Reply, code: str) -> None:
        life = self.lives_at(name, at, reply)
        if life is not None:
            assert (reply.code, reply.expected) == (code, life.position), (name, reply, life)

    def applied(self, name: str, x: np.ndarray, reply: Reply) -> Life:
        life = self.lives[name]
        assert isinstance(life, Life)
        chunks = (*life.chunks, x)
        outputs = self.world.oracle(np.concatenate(chunks))[-len(x) :].tobytes()
        assert (reply.status, reply.position) == (200, life.position + len(x)), (name, reply, life)
        assert reply.outputs == outputs, (name, life)
        self.lives[name] = replace(life, chunks=chunks, last=(life.position, x, outputs))
        return life

    # ── events of a session ──────────────────────────────────────────────────────────────────────

    @rule(name=IDS, at=REPLICAS)
    def open(self, name: str, at: int) -> None:
        durability = "memory" if name in VOLATILE else "stored"
        at = VOLATILE.index(name) if name in VOLATILE else at
        reply = self.call("POST", at, "/sessions", {"session_id": self.prefix + name, "durability": durability})
        life = self.lives[name]
        if reply.status == 409:
            assert isinstance(life, Life), (name, reply, life)
            assert (reply.code, reply.document["position"]) == ("session_exists", life.position)
        else:
            assert (reply.status, reply.document.get("durability")) == (201, durability), (name, reply)
            assert isinstance(life, Gone) or name in VOLATILE, (name, reply, life)
            self.lives[name] = Life(next(self.numbers))

    @rule(name=IDS, at=REPLICAS, way=st.sampled_from(WAYS), x=CHUNKS, says=st.booleans())
    def step(self, name: str, at: int, way: str, x: np.ndarray, says: bool) -> None:
        life = self.lives[name]
        position = life.position if says and isinstance(life, Life) else None
        reply = self.send(name, at, way, x, position)
        if not self.is_bound_to_another(name, at, way, reply) and self.lives_at(name, at, reply) is not None:
            self.applied(name, x, reply)

    @rule(name=IDS, at=REPLICAS, way=st.sampled_from(WAYS))
    def retry(self, name: str, at: int, way: str) -> None:
        life = self.lives[name]
        if isinstance(life, Life) and life.last is not None:
            start, x, outputs = life.last
            reply = self.send(name, at, way, x, start)
            if not self.is_bound_to_another(name, at, way, reply) and self.lives_at(name, at, reply) is not None:
                assert (reply.status, reply.outputs, reply.position) == (200, outputs, start + len(x)), (name, reply)

    @rule(name=IDS, at=REPLICAS, way=st.sampled_from(WAYS), x=CHUNKS, back=st.integers(1, 9))
    def come_late(self, name: str, at: int, way: str, x: np.ndarray, back: int) -> None:
        """Send a chunk too old for any replica to have its reply."""
        life = self.lives[name]
        if isinstance(life, Life):
            start = sum(map(len, life.chunks[:-DEPTH])) - back
            if start >= 0:
                reply = self.send(name, at, way, x, start)
                if not self.is_bound_to_another(name, at, way, reply):
                    self.refused(name, at, reply, "position_too_old")

    @rule(name=IDS, at=REPLICAS, way=st.sampled_from(WAYS), x=CHUNKS)
    def send_others(self, name: str, at: int, way: str, x: np.ndarray) -> None:
        """Send different values at the position of the last chunk."""
        life = self.lives[name]
        if isinstance(life, Life) and life.last is not None and not np.array_equal(x, life.last[1]):
            reply = self.send(name, at, way, x, life.last[0])
            if not self.is_bound_to_another(name, at, way, reply):
                self.refused(name, at, reply, "payload_mismatch")

    @rule(name=IDS, at=REPLICAS, way=st.sampled_from(WAYS), x=CHUNKS, ahead=st.integers(1, 5))
    def skip(self, name: str, at: int, way: str, x: np.ndarray, ahead: int) -> None:
        life = self.lives[name]
        position = (life.position if isinstance(life, Life) else 0) + ahead
        reply = self.send(name, at, way, x, position)
        if not self.is_bound_to_another(name, at, way, reply):
            self.refused(name, at, reply, "position_gap")

    @rule(name=IDS, at=REPLICAS)
    def look(self, name: str, at: int) -> None:
        """Check the session's position and every bit of its state."""
        reply = self.call("GET", at, self.path(name))
        life = self.lives_at(name, at, reply)
        if life is None:
            return
        assert reply.position == life.position
        state = self.call("GET", at, f"{self.path(name)}/state")
        if self.lives_at(name, at, state) is not None:
            self.saved[name] = state.outputs, life
            assert np.array_equal(self.row(state.outputs, life.position), self.row_of(life))

    def row(self, content: bytes, position: int) -> np.ndarray:
        manifest = self.world.oracle.manifest
        snapshot = Snapshot.from_bytes(content, digest=manifest.digest, state_size=manifest.state_size)
        assert snapshot.position == position
        return snapshot.row

    def row_of(self, life: Life) -> np.ndarray:
        oracle = self.world.oracle
        return oracle.all(np.concatenate(life.chunks))[1] if life.chunks else oracle.manifest.initial_row()

    @rule(name=IDS, at=REPLICAS)
    def restore(self, name: str, at: int) -> None:
        """Restore the session from a snapshot of this or an earlier session of the id."""
        if name in self.saved:
            content, then = self.saved[name]
            reply = self.call("PUT", at, f"{self.path(name)}/state", content)
            life = self.lives_at(name, at, reply)
            if life is not None:
                assert (reply.status, reply.position) == (200, then.position)
                self.lives[name] = replace(life, chunks=then.chunks, last=None)

    @rule(name=IDS, to=IDS, at=REPLICAS)
    def fork(self, name: str, to: str, at: int) -> None:
        if (name in VOLATILE) or (to in VOLATILE):
            return
        reply = self.call("POST", at, f"{self.path(name)}/fork", {"session_id": self.prefix + to})
        life = self.lives_at(name, at, reply)
        if life is None:
            return
        if isinstance(other := self.lives[to], Life):
            assert (reply.code, reply.document["position"]) == ("session_exists", other.position)
        else:
            assert (reply.status, reply.position, reply.document["durability"]) == (201, life.position, "stored")
            self.lives[to] = Life(next(self.numbers), life.chunks)

    @rule(name=IDS, at=REPLICAS)
    def close(self, name: str, at: int) -> None:
        reply = self.call("DELETE", at, self.path(name))
        life = self.lives_at(name, at, reply)
        if life is not None:
            assert (reply.status, reply.position) == (200, life.position)
            self.lives[name] = Gone.because("session_closed")

    @rule(name=IDS, at=REPLICAS, again=REPLICAS, x=CHUNKS)
    def finish(self, name: str, at: int, again: int, x: np.ndarray) -> None:
        """Send a chunk that ends the session, then again as after a lost reply."""
        life = self.lives[name]
        if isinstance(life, Life):
            reply = self.run(self.wires.send("v2", self.port(at), self.prefix + name, x, life.position, **END))
            if self.lives_at(name, at, reply) is not None:
                self.applied(name, x, reply)
                again = at if name in VOLATILE else again
                more = self.run(self.wires.send("v2", self.port(again), self.prefix + name, x, life.position, **END))
                assert (more.status, more.outputs, more.position) == (200, reply.outputs, reply.position)
                self.lives[name] = Gone.because("session_closed")

    @rule(name=st.sampled_from(DURABLE), at=REPLICAS, again=REPLICAS, x=CHUNKS)
    def begin(self, name: str, at: int, again: int, x: np.ndarray) -> None:
        """Send a chunk that opens a session, then again as after a lost reply."""
        if isinstance(self.lives[name], Gone):
            self.lives[name] = life = Life(next(self.numbers))
            x = x + np.float32(life.number)  # one that opened an earlier session of this id would be its late duplicate
            reply = self.run(self.wires.send("v2", self.port(at), self.prefix + name, x, 0, **START))
            self.applied(name, x, reply)
            more = self.run(self.wires.send("v2", self.port(again), self.prefix + name, x, 0, **START))
            assert (more.status, more.outputs, more.position) == (200, reply.outputs, reply.position)

    @rule(name=st.sampled_from(DURABLE), at=REPLICAS, x=CHUNKS)
    def start_over(self, name: str, at: int, x: np.ndarray) -> None:
        """Send a start without a position, which ends the open session and begins another."""
        self.lives[name] = Life(next(self.numbers))
        self.applied(name, x, self.run(self.wires.send("v2", self.port(at), self.prefix + name, x, None, **START)))

    @rule(
        name=st.sampled_from(DURABLE), at=REPLICAS, again=REPLICAS, chunks=st.lists(CHUNKS, min_size=2, max_size=DEPTH)
    )
    def pipeline(self, name: str, at: int, again: int, chunks: list[np.ndarray]) -> None:
        """Send several chunks without waiting for replies, then all again as after a broken connection."""
        life = self.lives[name]
        position = life.position if isinstance(life, Life) else 0
        replies = self.send_all(name, at, chunks, position)
        if self.lives_at(name, at, replies[0]) is not None:
            for x, reply in zip(chunks, replies, strict=True):
                self.applied(name, x, reply)
            assert self.send_all(name, again, chunks, position) == replies

    def send_all(self, name: str, at: int, chunks: list[np.ndarray], position: int) -> list[Reply]:
        stream = Stream(self.wires, self.port(at), self.prefix + name, DEPTH)
        replies = self.world.runner.run(stream.send_all(chunks, position))
        stream.close()
        return replies

    # ── events of the servers and the store ──────────────────────────────────────────────────────

    @rule(at=REPLICAS)
    def restart(self, at: int) -> None:
        for name, where in [*self.streams]:
            if where == at:
                self.streams.pop((name, where))[0].close()
        self.world.restart(at)
        self.lives[VOLATILE[at]] = Gone()

    @rule(at=REPLICAS, seconds=st.sampled_from([10.0, IDLE_SECONDS + 1]))
    def wait(self, at: int, seconds: float) -> None:
        """Advance a replica's clock. Only the store's clock decides about durable sessions."""
        self.world.clocks[at].advance(seconds)
        if seconds > IDLE_SECONDS:
            before = self.lives[VOLATILE[at]]
            codes = before.codes if isinstance(before, Gone) else {"session_expired"}
            self.lives[VOLATILE[at]] = Gone.because("session_unknown", *codes)

    @rule(name=st.sampled_from(DURABLE))
    def expire(self, name: str) -> None:
        """Expire the session as the idle timeout would."""
        if isinstance(self.lives[name], Life):
            key, client = self.key(name), self.world.redis.client
            assert client.pexpire(key, 1), "an open session must be in the store"
            until(lambda: not client.exists(key))
            self.lives[name] = Gone.because("session_expired")

    @rule()
    def lose_everything(self) -> None:
        self.world.redis.client.flushall()
        self.world.redis.client.script_flush()
        for name in DURABLE:  # a replica may have a tombstone of an earlier session of this id
            self.lives[name] = Gone.because("session_unknown", "session_closed", "session_expired")

    @rule(name=st.sampled_from(DURABLE))
    def back_up(self, name: str) -> None:
        life = self.lives[name]
        if isinstance(life, Life):
            self.dumped[name] = self.world.redis.client.dump(self.key(name)), life

    @rule(name=st.sampled_from(DURABLE))
    def put_back(self, name: str) -> None:
        """Restore an older record, like a failover that loses the last writes."""
        if name in self.dumped:
            content, life = self.dumped[name]
            self.world.redis.client.restore(self.key(name), int(IDLE_SECONDS * 1000), content, replace=True)
            self.lives[name] = replace(life, number=next(self.numbers))

    def key(self, name: str) -> str:
        return f"unroll:{{tiny/{self.prefix}{name}}}"

    def teardown(self) -> None:
        try:
            for name in self.lives:
                for at in (0, 1):
                    self.look(name, at)
        finally:
            for stream, _ in self.streams.values():
                stream.close()
            self.wires.close()


@pytest.mark.timeout(300 + 30 * EXAMPLES)  # time for Hypothesis to shrink a failure
def test_any_order_of_events(redis_server: RedisServer, tiny: Path, oracle: Oracle) -> None:
    world = World(tiny, redis_server, oracle)
    limits = settings(
        max_examples=EXAMPLES,
        stateful_step_count=20,
        deadline=None,
        phases=set(Phase) - {Phase.explain},  # the explain phase traces every line
        suppress_health_check=[HealthCheck.too_slow],
    )
    try:
        run_state_machine_as_test(lambda: AppMachine(world), settings=limits)
    finally:
        world.end()
