"""The program: all commands, and the messages for usage errors.

A command is imported when it is called, or when help lists it.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from inspect import cleandoc
from typing import Any

import click

from unroll import __version__
from unroll.commands import completion
from unroll.commands.help import Command, Group, usage
from unroll.commands.options import Failed as Failed
from unroll.commands.options import Option, Runnable, called, parameters

_HELP = {"help_option_names": ["-h", "--help"]}

#: The location of each command below `unroll.commands`; for a group, its description and its commands.
_COMMANDS: dict[str, str | tuple[str, dict[str, str]]] = {
    "export": "export:Export",
    "inspect": "inspect:Inspect",
    "verify": "verify:Verify",
    "serve": "serve:Serve",
    "stream": "stream:Stream",
    "rollout": "rollout:Rollout",
    "bench": "bench:Bench",
    "doctor": "doctor:Doctor",
    "demo": "demo:Demo",
    "config": ("Show the settings of a server.", {"show": "config:Show"}),
    "store": ("Check the store of durable sessions.", {"check": "store:Check"}),
    "keys": (
        "Create API keys for servers, and key pairs for signing bundles.",
        {"new": "keys:New", "check": "keys:Check", "pair": "keys:Pair"},
    ),
    "sessions": (
        "Manage the sessions in a store.",
        {name: f"sessions:{name.capitalize()}" for name in ("list", "show", "close", "export", "import")},
    ),
}


class UsageError(Exception):
    """The arguments are invalid; the message is for the user."""


class _Program(Group):
    """A group that imports a command when it is called."""

    def __init__(self, about: str, places: Mapping[str, str | tuple[str, dict[str, str]]]) -> None:
        super().__init__(help=about, context_settings=_HELP, no_args_is_help=False)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = self._places.get(cmd_name)
        if isinstance(place, tuple):
            return _Program(*place)
        return _command(cmd_name, place) if place else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self._places and not name.startswith("-"):
            meant = get_close_matches(name, self._places, 1)
            ctx.fail(f"no such command {name!r}{f'; did you mean {meant[0]!r}?' if meant else ''}")
        return super().resolve_command(ctx, args)


def parse(argv: list[str]) -> Runnable | int:
    """Find the command and read its options.

    Returns:
        The command; or an exit status, if help or the version was printed.

    Raises:
        UsageError: A command or option does not exist, or a value is invalid.
    """
    try:
        found: Runnable | int | None = application().main(argv, prog_name="unroll", standalone_mode=False)
    except click.UsageError as error:
        raise UsageError(_explained(error)) from None
    return found or 0


def application() -> click.Group:
    program = _Program("Serve stacked GRU and LSTM models trained in PyTorch.", _COMMANDS)
    program.params += [
        _printing("--version", "print the version and exit", lambda: f"unroll {__version__}"),
        _printing("--install-completion", "install completion for this shell", completion.install),
        _printing("--show-completion", "print the completion script for this shell", completion.script),
    ]
    return program


def _printing(flag: str, about: str, answer: Callable[[], str]) -> click.Option:
    """An option that prints its answer and exits."""

    def callback(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
        if asked:
            print(answer())
            ctx.exit()

    return Option([flag], is_flag=True, is_eager=True, expose_value=False, help=about, callback=callback)


def _command(name: str, place: str) -> click.Command:
    module, _, kind = place.partition(":")
    command: type[Runnable] = getattr(import_module(f"unroll.commands.{module}"), kind)

    def callback(**values: Any) -> Runnable:
        return called(command, values)

    return Command(
        name,
        params=parameters(command),
        help=cleandoc(command.__doc__ or ""),
        context_settings=_HELP,
        callback=callback,
    )


def _explained(error: click.UsageError) -> str:
    """The error, followed by the usage of the command."""
    ctx = error.ctx
    assert ctx is not None
    if isinstance(error, click.NoSuchOption):
        names = [name[2:] for param in ctx.command.get_params(ctx) for name in param.opts if name.startswith("--")]
        meant = get_close_matches(error.option_name.lstrip("-"), names, 1)  # dashes would make all names similar
        what = f"there is no option {error.option_name!r}{f'; did you mean --{meant[0]}?' if meant else ''}"
    else:
        message = error.format_message().rstrip(".")
        what = message[:1].lower() + message[1:]
        if isinstance(error, click.MissingParameter) and error.param and error.param.envvar:
            what += f", or set {error.param.envvar}"
    lists = "commands" if isinstance(ctx.command, click.Group) else "options"
    return f"{ctx.command_path}: {what}\n{usage(ctx)}   ({ctx.command_path} --help lists the {lists})"
