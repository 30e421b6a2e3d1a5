"""Many clients that step on the same replicas, and the verdict on their sessions."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from faults.client import Client, Tally
from faults.history import Track, Verdict, check
from faults.wires import WAYS, Wires
from oracle import Oracle


class Crowd:
    """Clients of the replicas on `ports`. pause: Average seconds that a client waits between steps."""

    def __init__(
        self,
        ports: Sequence[int],
        seed: int,
        sessions: int,
        *,
        pause: float = 0.02,
        timeout: float = 5.0,
        ways: Sequence[str] = WAYS,
        follows_gaps: bool = False,
        prefix: str = "session",
    ) -> None:
        chance = random.Random(seed)
        self.tally = Tally()
        self.tracks = [Track(f"{prefix}-{i}") for i in range(sessions)]
        self._pause = pause
        self._wires = Wires("tiny", ("x", "y"), timeout)
        self._clients = [
            Client(
                track,
                self._wires,
                ports,
                random.Random(chance.getrandbits(32)),
                self.tally,
                ways=ways,
                follows_gaps=follows_gaps,
            )
            for track in self.tracks
        ]

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(client.open() for client in self._clients))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for client in self._clients:
            client.close()
        self._wires.close()

    @asynccontextmanager
    async def stepping(self) -> AsyncIterator[None]:
        """Let all clients step until the block ends, then wait for their last replies."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(client.live(stop, self._pause))
            try:
                yield
            finally:
                stop.set()

    async def acknowledged(self, steps: int) -> None:
        """Wait until this many more steps are acknowledged."""
        wanted = self.steps + steps
        await self._until(lambda: self.steps >= wanted)

    async def hears(self, code: str) -> None:
        """Wait until any client gets this code."""
        before = self.tally.outcomes[code]
        await self._until(lambda: self.tally.outcomes[code] > before)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.complaints, self.complaints
            self.tally.changed.clear()
            await self.tally.changed.wait()

    @property
    def steps(self) -> int:
        return sum(track.position for track in self.tracks)

    @property
    def complaints(self) -> list[tuple[str, str]]:
        return [complaint for track in self.tracks for complaint in track.complaints]

    async def close_sessions(self) -> None:
        await asyncio.gather(*(client.end() for client in self._clients))
        assert not self.complaints, self.complaints

    async def verdict(self, oracle: Oracle) -> Verdict:
        """Read the state of every session and check the whole history."""
        await asyncio.gather(*(client.look() for client in self._clients))
        return check(self.tracks, oracle)
