"""`unroll serve`."""

from dataclasses import dataclass

import typer


@dataclass(frozen=True)
class Serve:
    """Serve a repository of bundles."""

    context: typer.Context

    def run(self) -> int:
        from unroll.service.serve import main

        return main(self.context.args)
