"""No durability: the arena is the only copy. After a restart sessions are reported as unknown."""

from service.engine.base import Rows


class MemoryStore:
    durability = "memory"

    async def commit(self, batch: Rows) -> None:
        """The arena already holds the rows."""
