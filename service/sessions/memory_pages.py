"""The memory sessions of this process, page by page in the order of their names."""

from collections.abc import Callable, Iterator
from functools import partial
from heapq import nsmallest

from unroll.service.core.clock import Clock
from unroll.service.core.session_ids import tenant_of
from unroll.service.models.served_model import ServedModel
from unroll.service.scheduler.session import Session
from unroll.service.sessions.directory import SessionDirectory
from unroll.service.store.interface import Key, Listed, Page
from unroll.service.store.record import MEMORY, Record


class MemoryPages:
    """Reads sessions as they are: none is used by that, and no cohort dissolved.

    Args:
        idle_timeout: Seconds until an idle session expires; None: never.
    """

    def __init__(self, directory: SessionDirectory, clock: Clock, idle_timeout: float | None) -> None:
        self._directory = directory
        self._clock = clock
        self._idle_timeout = idle_timeout

    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        """See `Store.page`. A page is named by the last session of the one before."""
        later = ((key, read) for key, read in self._all(tenant) if "/".join(key) > after)
        chosen = nsmallest(limit + 1, later, key=lambda entry: "/".join(entry[0]))
        more = "/".join(chosen[limit - 1][0]) if len(chosen) > limit else ""
        return Page([read() for _, read in chosen[:limit]], [], more)

    def _all(self, tenant: str | None) -> Iterator[tuple[Key, Callable[[], Listed]]]:
        for model in self._directory.versions:
            for session in model.scheduler.sessions:
                if session.durable is None and tenant in (None, tenant_of(session.id)):
                    yield (model.name, session.id), partial(self._resident, model, session)
        for key, record, used in self._directory.spilled:
            if tenant in (None, tenant_of(key[1])):
                yield key, partial(self._spilled, key, record, used)

    def _resident(self, model: ServedModel, session: Session) -> Listed:
        if (cohort := session.cohort) is not None:
            position, used = int(cohort.positions[cohort.sessions.index(session)]), cohort.last_used
        else:
            position, used = session.position, session.last_used
        size = 4 * model.manifest.state_size
        return Listed((model.name, session.id), model.manifest.digest, MEMORY, position, self._expires_in(used), size)

    def _spilled(self, key: Key, record: Record, used: float) -> Listed:
        origin, size = record.origin, len(record.row) + len(record.last)
        return Listed(key, origin.model, origin.durability, record.position, self._expires_in(used), size)

    def _expires_in(self, used: float) -> float | None:
        return None if self._idle_timeout is None else self._idle_timeout - (self._clock.now() - used)
