"""What the loop needs of a store. One implementation a file."""

from collections.abc import Sequence
from typing import Protocol

from service.engine.base import BatchRow


class Store(Protocol):
    """`durability` is stated in the API's answer when a session opens."""

    @property
    def durability(self) -> str: ...

    async def commit(self, batch: Sequence[BatchRow]) -> None:
        """Make the new states of a batch durable. The loop answers no row of the batch before this returns."""
        ...
