"""Lists the memory sessions of this process in pages, ordered by name."""

import asyncio

from unroll.service.core.clock import Clock
from unroll.service.core.session_ids import tenant_of
from unroll.service.models.served_model import ServedModel
from unroll.service.scheduler.session import Session
from unroll.service.sessions.directory import SessionDirectory
from unroll.service.store.interface import Key, Listed, Page
from unroll.service.store.record import MEMORY, Record

#: Sessions examined per turn of the event loop.
_SLICE = 2048


class MemoryPages:
    """Reads sessions without side effects: it neither counts as use nor dissolves cohorts.

    Args:
        idle_timeout: Seconds until an idle session expires; None: never.
    """

    def __init__(self, directory: SessionDirectory, clock: Clock, idle_timeout: float | None) -> None:
        self._directory = directory
        self._clock = clock
        self._idle_timeout = idle_timeout

    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        """See `Store.page`. A page's name is the last session of the previous page."""
        chosen = await self._first(after, limit + 1, tenant)
        found = [listed for _, key in chosen[:limit] if (listed := self._listed(key)) is not None]
        return Page(found, [], chosen[limit - 1][0] if len(chosen) > limit else "")

    async def _first(self, after: str, count: int, tenant: str | None) -> list[tuple[str, Key]]:
        """The first `count` sessions after a name, as (name, key), ordered by name.

        Examines one slice of the sessions per turn of the event loop.
        """
        keys, first = self._keys(), list[tuple[str, Key]]()
        for begin in range(0, len(keys), _SLICE):
            part = [("/".join(key), key) for key in keys[begin : begin + _SLICE] if tenant in (None, tenant_of(key[1]))]
            last = first[-1] if len(first) == count else None
            first = sorted(first + [each for each in part if each[0] > after and (last is None or each < last)])[:count]
            await asyncio.sleep(0)
        return first

    def _keys(self) -> list[Key]:
        resident = [
            (model.name, session.id)
            for model in self._directory.versions
            for session in model.scheduler.sessions
            if session.durable is None
        ]
        return resident + self._directory.spilled.keys()

    def _listed(self, key: Key) -> Listed | None:
        for model in self._directory.versions.of(key[0]):
            if (session := model.scheduler.sessions.get(key[1])) is not None and session.durable is None:
                return self._resident(model, session)
        found = self._directory.spilled.get(key)
        return None if found is None else self._spilled(key, *found)

    def _resident(self, model: ServedModel, session: Session) -> Listed:
        if (cohort := session.cohort) is not None:
            position, used = int(cohort.positions[cohort.slots == session.slot][0]), cohort.last_used
        else:
            position, used = session.position, session.last_used
        size = 4 * model.manifest.state_size
        return Listed((model.name, session.id), model.manifest.digest, MEMORY, position, self._expires_in(used), size)

    def _spilled(self, key: Key, record: Record, used: float) -> Listed:
        origin, size = record.origin, len(record.row) + len(record.last)
        return Listed(key, origin.model, origin.durability, record.position, self._expires_in(used), size)

    def _expires_in(self, used: float) -> float | None:
        return None if self._idle_timeout is None else self._idle_timeout - (self._clock.now() - used)
