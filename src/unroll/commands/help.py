"""Formats `--help`: usage, purpose, and grouped options, coloured on a terminal."""

import io
import shutil
import sys
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from typing import Any

import click

_WIDEST = 100
_OPTIONS = "options"


class Command(click.Command):
    """A command with this module's help."""

    def get_help(self, ctx: click.Context) -> str:
        return text(ctx)


class Group(Command, click.Group):
    """A command with subcommands."""


def usage(ctx: click.Context) -> str:
    """The usage line of a command."""
    command: Any = ctx.command
    words = [ctx.command_path, "[OPTIONS]"]
    for param in command.params:
        if param.param_type_name == "argument":
            name = f"{param.metavar}{' ...' if param.nargs != 1 else ''}"
            words.append(name if param.required else f"[{name}]")
        elif param.required:
            words.append(f"{param.opts[0]} {param.metavar}")
    if isinstance(command, click.Group):
        words += ["COMMAND", "..."]
    return f"usage: {' '.join(words)}"


def text(ctx: click.Context) -> str:
    """The help of a command, as wide as the terminal but at most 100 columns."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    console = Console(file=io.StringIO(), width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(escape(usage(ctx)), soft_wrap=True)
    for paragraph in cleandoc(ctx.command.help or "").split("\n\n"):
        console.print()
        console.print(escape(paragraph if paragraph.startswith(" ") else paragraph.replace("\n", " ")))
    sections = list(_sections(ctx))
    names = max(len(name) for _, rows in sections for name, _ in rows)
    longest = max(len(word) for _, rows in sections for name, _ in rows for word in name.split())
    left = max(width // 3, longest)  # never cut a name
    for title, rows in sections:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=min(names, left), max_width=left)
        table.add_column()
        for name, about in rows:
            table.add_row(f"[bold cyan]{escape(name)}[/]", escape(about))
        console.print(f"\n[bold]{title}[/]")
        console.print(Padding(table, (0, 0, 0, 2)))
    console.print(f"\n{escape(ctx.command.epilog)}" if ctx.command.epilog else "", end="")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def _sections(ctx: click.Context) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the title of each group, with its names and their descriptions."""
    command: Any = ctx.command
    if isinstance(command, click.Group):
        commands = {name: command.get_command(ctx, name) for name in command.list_commands(ctx)}
        yield "commands", [(name, (one.help or "").split("\n")[0]) for name, one in commands.items() if one]
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if param.param_type_name == "argument":
            groups.setdefault("arguments", []).append((param.metavar, param.help or ""))
        elif not param.hidden:
            groups.setdefault(getattr(param, "group", None) or _OPTIONS, []).append(_option(param))
    yield from sorted(groups.items(), key=lambda group: group[0] == _OPTIONS)


def _option(param: Any) -> tuple[str, str]:
    short_first: Iterable[str] = sorted(param.opts, key=len)
    value = "" if param.is_flag else f" {param.metavar}"
    about = "show this help and exit" if "--help" in param.opts else (param.help or "")
    shown = param.show_default and not param.required and param.default not in (None, "") and not param.is_flag
    facts = [f"default: {param.default}"] * bool(shown) + [f"or ${param.envvar}"] * bool(param.envvar)
    names = ", ".join(short_first) + "".join(f"/{other}" for other in param.secondary_opts)
    return names + value, about + (f" ({'; '.join(facts)})" if facts else "")
