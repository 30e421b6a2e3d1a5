"""No durability: the arena is the only copy. After a restart sessions are reported as unknown."""

from collections.abc import Sequence

from service.engine.base import BatchRow


class MemoryStore:
    durability = "memory"

    async def commit(self, batch: Sequence[BatchRow]) -> None:
        """The arena already holds the rows."""
