"""`unroll inspect`."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unroll.commands.options import Bundle, Failed, Json

if TYPE_CHECKING:
    from unroll.bundle import Content


@dataclass(frozen=True)
class Inspect:
    """Show a bundle's inputs, outputs, state, operators and measured parity."""

    bundle: Bundle
    json: Json = False

    def run(self) -> int:
        from unroll.bundle import BundleError, parse, read_content
        from unroll.bundle.inspect import describe, lines

        try:
            content = read_content(self.bundle.resolve())
            found = describe(parse(content, allowed_operators=None), _signed_by(content))  # nothing is executed
        except BundleError as error:
            raise Failed(f"{self.bundle}: {error}") from error
        print(json.dumps(found, indent=2)) if self.json else print(*lines(found), sep="\n")
        return 0


def _signed_by(content: "Content") -> str | None:
    from unroll.bundle.signature import KeyUnusable, signed_by

    try:
        return signed_by(content)
    except KeyUnusable as error:
        return f"unknown: {error}"
