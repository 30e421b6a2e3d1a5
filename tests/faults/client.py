"""A well-behaved client: it sends the position with each chunk and retries until the chunk is acknowledged.

Every try goes to a random replica over one of four random protocols. Sometimes the client repeats an earlier request,
or sends one that must be refused. Every reply goes into its `Track`.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from faults.history import Track
from faults.wires import NO_SERVER, WAYS, Broken, Reply, Stream, Wires
from waiting import PATIENCE

#: Codes after which the request may be retried: nothing was applied, or the stored reply is available.
RETRY = {
    "store_unavailable",
    "session_contended",
    "draining",
    "queue_full",
    "deadline_unreachable",
    "deadline_exceeded",
    "capacity_exhausted",
    "version_unavailable",
    NO_SERVER,
}


class Refused(Exception):
    """The server sent an invalid reply, which is recorded as a complaint in the track."""


@dataclass
class Tally:
    """The replies to all clients.

    Attributes:
        outcomes: Every try, counted by status or code.
        seconds: Latency of each step, from its first try to its answer.
        changed: Set after each outcome.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[tuple[float, float]] = field(default_factory=list)  # (time of the reply, duration)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def percentile(self, percent: float, since: float = 0.0, until: float = float("inf")) -> float:
        """Return a latency percentile in milliseconds, over the steps answered between `since` and `until`."""
        taken = [seconds for when, seconds in self.seconds if since <= when < until]
        return float(np.percentile(taken, percent)) * 1e3


class Client:
    """One client of the replicas on `ports`.

    follows_gaps: Whether to resend steps that the store lost. Otherwise a lost step is a fault.
    """

    def __init__(
        self,
        track: Track,
        wires: Wires,
        ports: Sequence[int],
        chance: random.Random,
        tally: Tally,
        *,
        ways: Sequence[str] = WAYS,
        follows_gaps: bool = False,
    ) -> None:
        self.track = track
        self.ways = ways
        self.follows_gaps = follows_gaps
        self._wires, self._ports, self._chance, self._tally = wires, ports, chance, tally
        self._numbers = np.random.default_rng(chance.getrandbits(32))
        self._stream: Stream | None = None

    async def live(self, stop: asyncio.Event, pause: float) -> None:
        """Step, with an average pause of `pause` seconds, until `stop` or a fault."""
        do = [self.step] * 20 + [self.repeat] * 3
        if not self.follows_gaps:  # otherwise the store could accept it after a loss
            do += [self.send_others, self.skip]
        while not stop.is_set():
            try:
                await self._chance.choice(do)()
            except Refused:
                return
            await asyncio.sleep(self._chance.uniform(0, 2 * pause))

    async def open(self) -> None:
        """Open the session. It may exist already if an earlier reply was lost."""
        path = "/sessions"
        body = {"session_id": self.track.id}
        reply = await self._until_answered(lambda way, port: self._wires.call("POST", port, path, body), ("json",))
        if reply.status != 201 and (reply.code, reply.document.get("position")) != ("session_exists", 0):
            self._note(reply)

    async def step(self) -> None:
        """Send the next chunk of one or a few steps."""
        x = self.chunk()
        self.track.sent, began = x, time.monotonic()
        await self._until_acknowledged(self.track.position, x)
        now = time.monotonic()
        self._tally.seconds.append((now, now - began))

    async def repeat(self) -> None:
        """Send the last chunk again, as after a lost reply."""
        if self.track.chunks:
            last = self.track.chunks[-1]
            await self._until_acknowledged(self.track.position - len(last), last)

    async def send_others(self) -> None:
        """Send other values at the position of the last chunk."""
        if self.track.chunks:
            start = self.track.position - len(self.track.chunks[-1])
            await self._must_refuse(start, "payload_mismatch")

    async def skip(self) -> None:
        """Send a chunk that begins after the current position."""
        await self._must_refuse(self.track.position + self._chance.randint(1, 5), "position_gap")

    async def look(self) -> None:
        """Read the final position and state of the session."""
        path = f"/sessions/{self.track.id}/state"
        reply = await self._until_answered(lambda way, port: self._wires.call("GET", port, path), ("json",))
        if reply.status == 200:
            self.track.state = reply.outputs
        else:
            self._note(reply)

    async def end(self) -> None:
        """Close the session, which may be closed already if the reply was lost."""
        path = f"/sessions/{self.track.id}"
        reply = await self._until_answered(lambda way, port: self._wires.call("DELETE", port, path), ("json",))
        if reply.status != 200 and reply.code != "session_closed":
            self._note(reply)

    def chunk(self) -> np.ndarray:
        steps = self._chance.choice((1, 1, 1, 2, 5))
        return self._numbers.standard_normal((steps, 2)).astype(np.float32)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    async def _until_acknowledged(self, start: int, x: np.ndarray) -> None:
        reply = await self._until_answered(lambda way, port: self._send(way, port, x, start), self.ways)
        if reply.status == 200:
            self.track.answered(start, x, reply.outputs, reply.position)
        elif self.follows_gaps and reply.code == "position_gap" and (reply.expected or 0) < start:
            await self._go_back(reply.expected or 0)
            await self._until_acknowledged(start, x)
        else:
            self._complain(reply)

    async def _go_back(self, expected: int) -> None:
        """Resend the steps that the store lost, from the chunk that begins at `expected`."""
        position = 0
        for chunk in [*self.track.chunks]:
            if position >= expected:
                await self._until_acknowledged(position, chunk)
            position += len(chunk)

    async def _must_refuse(self, start: int, code: str) -> None:
        other = self.chunk()
        reply = await self._until_answered(lambda way, port: self._send(way, port, other, start), self.ways)
        if (reply.code, reply.expected) != (code, self.track.position):
            self._complain(reply)

    def _complain(self, reply: Reply) -> NoReturn:
        self._note(reply)
        raise Refused(self.track.complaints[-1])

    def _note(self, reply: Reply) -> None:
        way = "a stream" if reply.status == 0 else f"status {reply.status}"
        self.track.refused(self.track.position, reply.code or way, reply.expected, f"{way}, {dict(reply.document)}")

    async def _until_answered(self, send: Callable[[str, int], Awaitable[Reply]], ways: Sequence[str]) -> Reply:
        """Retry until a final reply. Raises TimeoutError if there is none."""
        end, tries = time.monotonic() + PATIENCE, 0
        while True:
            reply = None
            try:
                reply = await send(self._chance.choice(ways), self._chance.choice(self._ports))
                outcome = reply.code or str(reply.status)
            except Broken as broken:
                outcome = broken.kind
            self._tally.outcomes[outcome] += 1
            self._tally.changed.set()
            if reply is not None and outcome not in RETRY:
                return reply
            tries += 1
            if time.monotonic() > end:
                raise TimeoutError(f"session {self.track.id} was not answered in {tries} tries, last {outcome}")
            await asyncio.sleep(self._chance.uniform(0, 0.04 * min(tries, 10)))

    async def _send(self, way: str, port: int, x: np.ndarray, position: int) -> Reply:
        if way != "stream":
            return await self._wires.send(way, port, self.track.id, x, position)
        if self._chance.random() < 0.2:
            self.close()
        self._stream = self._stream or Stream(self._wires, port, self.track.id)
        reply = None
        try:
            reply = await self._stream.send(x, position)
        finally:
            if reply is None or reply.code:
                self.close()
        return reply
