"""`python -m unroll.commands.reference FILE` writes the help of every command there, below a mark."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from typer.main import get_command

from unroll import cli
from unroll.commands.program import application

#: Before the first section that is written.
MARK = "<!-- from here on: the help of every command, written by `python -m unroll.commands.reference` -->\n"


def commands() -> Iterator[list[str]]:
    """Yield the words of every command, such as `sessions list`."""
    program: Any = get_command(application())
    for name, command in program.commands.items():
        actions = getattr(command, "commands", None)
        yield from [[name]] if actions is None else [[name, action] for action in actions]


def sections() -> str:
    """The help of every command, in Markdown."""
    found = []
    for command in commands():
        text = io.StringIO()
        with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(text):
            cli.main([*command, "--help"])
        found.append(f"\n## unroll {' '.join(command)}\n\n```text\n{text.getvalue()}```\n")
    return "".join(found)


def main(path: Path) -> None:
    """Rewrite the sections."""
    head, _, _ = path.read_text(encoding="utf-8").partition(MARK)
    path.write_text(head + MARK + sections(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
