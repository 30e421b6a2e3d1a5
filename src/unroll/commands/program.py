"""The program: every command, and what a wrong argument is answered with."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Protocol

import typer

from unroll import __version__
from unroll.commands import keys
from unroll.commands.bench import Bench
from unroll.commands.config import Show
from unroll.commands.demo import Demo
from unroll.commands.doctor import Doctor
from unroll.commands.export import Export
from unroll.commands.help import Command, Group, usage
from unroll.commands.inspect import Inspect
from unroll.commands.options import Failed as Failed
from unroll.commands.rollout import Rollout
from unroll.commands.serve import Serve
from unroll.commands.sessions import SESSIONS
from unroll.commands.store import Check
from unroll.commands.stream import Stream
from unroll.commands.verify import Verify

#: What typer raises for wrong arguments; it exports only the errors derived from it.
_UsageError: Any = typer.BadParameter.__bases__[0]
_HELP = {"help_option_names": ["-h", "--help"]}


class Runnable(Protocol):
    """A command with the values of its options."""

    def run(self) -> int:
        """Returns the exit status."""


class UsageError(Exception):
    """The arguments are wrong; the message is what the user reads."""


def parse(argv: list[str]) -> Runnable | int:
    """Find the command and read its options.

    Returns:
        The command; or an exit status, if help or the version was asked for and printed.

    Raises:
        UsageError: There is no such command or option, or a value is not allowed.
    """
    try:
        found = typer.main.get_command(application())(argv, prog_name="unroll", standalone_mode=False)
    except _UsageError as error:
        raise UsageError(_explained(error)) from None
    return found or 0


def application() -> typer.Typer:
    app = _group("Serve stacked GRU and LSTM models trained in PyTorch.", add_completion=True)
    app.callback()(_version)
    _add(
        app,
        {
            "export": Export,
            "inspect": Inspect,
            "verify": Verify,
            "serve": Serve,
            "stream": Stream,
            "rollout": Rollout,
            "bench": Bench,
            "doctor": Doctor,
            "demo": Demo,
        },
    )
    for name, about, commands in (
        ("config", "Show the settings of a server.", {"show": Show}),
        ("store", "Examine the store of durable sessions.", {"check": Check}),
        ("keys", "Make API keys for a server that others can reach.", {"new": keys.New, "check": keys.Check}),
        ("sessions", "Look after the sessions of a store.", SESSIONS),
    ):
        group = _group(about)
        _add(group, commands)
        app.add_typer(group, name=name)
    return app


def _add(app: typer.Typer, commands: Mapping[str, type[Runnable]]) -> None:
    for name, command in commands.items():
        app.command(name, cls=Command)(command)


def _group(about: str, *, add_completion: bool = False) -> typer.Typer:
    return typer.Typer(cls=Group, help=about, context_settings=_HELP, add_completion=add_completion)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"unroll {__version__}")
        raise typer.Exit


def _version(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve stacked GRU and LSTM models trained in PyTorch."""


def _explained(error: Any) -> str:
    """What is wrong, and how the command is called."""
    ctx = error.ctx
    if hasattr(error, "possibilities"):
        names = [name for param in ctx.command.get_params(ctx) for name in param.opts if name.startswith("--")]
        meant = get_close_matches(error.option_name, names, 1)
        what = f"there is no option {error.option_name!r}{f'; did you mean {meant[0]!r}?' if meant else ''}"
    else:
        message = error.format_message().rstrip(".").replace(". Did you", "; did you").replace("Value error, ", "")
        what = message[:1].lower() + message[1:]
    lists = "commands" if isinstance(ctx.command, Group) else "options"
    return f"{ctx.command_path}: {what}\n{usage(ctx)}   ({ctx.command_path} --help lists the {lists})"
