"""`unroll export`."""

from dataclasses import dataclass

import typer


@dataclass(frozen=True)
class Export:
    """Convert a PyTorch model to a bundle that is proven equal to it."""

    context: typer.Context

    def run(self) -> int:
        from unroll.export.__main__ import main

        return main(self.context.args)
