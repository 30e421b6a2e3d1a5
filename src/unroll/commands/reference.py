"""`python -m unroll.commands.reference FILE` writes the help of every command to FILE, below a marker."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click

from unroll import cli
from unroll.commands.program import application

#: Marks the start of the generated sections.
MARK = "<!-- from here on: the help of every command, written by `python -m unroll.commands.reference` -->\n"


def commands() -> Iterator[list[str]]:
    """Yield the words of every command, such as `sessions list`."""
    program = application()
    ctx = click.Context(program)
    for name in program.list_commands(ctx):
        command = program.get_command(ctx, name)
        actions = command.list_commands(ctx) if isinstance(command, click.Group) else []
        yield from [[name, action] for action in actions] or [[name]]


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
