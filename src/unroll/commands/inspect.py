"""`unroll inspect`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unroll.commands.options import Failed, Json, argument


@dataclass(frozen=True)
class Inspect:
    """Show a bundle's inputs, outputs, state, operators and measured parity."""

    bundle: Annotated[Path, argument("BUNDLE", "the folder REPOSITORY/NAME/VERSION")]
    json: Json = False

    def run(self) -> int:
        from unroll.bundle import BundleError, read
        from unroll.bundle.inspect import describe, lines

        try:
            found = describe(read(self.bundle.resolve(), allowed_operators=None))  # nothing of it runs here
        except BundleError as error:
            raise Failed(f"{self.bundle}: {error}") from error
        print(json.dumps(found, indent=2)) if self.json else print(*lines(found), sep="\n")
        return 0
