"""What the loop needs of a store. One implementation a file."""

from typing import Protocol

from service.engine.base import Rows


class Store(Protocol):
    """`durability` is stated in the API's answer when a session opens."""

    @property
    def durability(self) -> str: ...

    async def commit(self, batch: Rows) -> None:
        """Make the new states of a batch durable. The loop answers no row of the batch before this returns."""
        ...
