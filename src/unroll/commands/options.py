"""Declares the options of commands, and the exceptions for invalid ones."""

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

import click

LOCAL = "http://127.0.0.1:8000"
_CLICK = {str: click.STRING, int: click.INT, float: click.FLOAT, Path: click.Path(path_type=Path)}


class Failed(Exception):
    """The command failed; the message gives the reason and a remedy."""

    status = 1


class WrongOption(Failed):
    """An argument or option is invalid in a way that only the command itself can detect."""

    status = 2


class Runnable(Protocol):
    """A command with the values of its options."""

    def run(self) -> int:
        """Run the command. Returns the exit status."""


@dataclass(frozen=True, slots=True)
class Declared:
    """The declaration of an option or argument, in the annotation of a command's field.

    Attributes:
        flags: The flag, such as `--json` or `--page/--no-page`; empty for an argument.
        metavar: The value's placeholder in help; `a|b` restricts the value to these words. Empty for a switch.
        help: The description in help.
        check: Called with the value; raises ValueError with the reason if it is invalid.
        envvar: The environment variable with the default.
        group: The heading in help.
        hidden: Whether help omits the option.
        show_default: Whether help shows the default.
    """

    flags: str
    metavar: str
    help: str
    check: Callable[[Any], Any] | None = None
    envvar: str | None = None
    group: str | None = None
    hidden: bool = False
    show_default: bool = True


class Option(click.Option):
    """An option with a heading in help."""

    group: str | None = None


class Argument(click.Argument):
    """An argument with a help text."""

    help = ""


def argument(metavar: str, help: str, check: Callable[[Any], Any] | None = None) -> Declared:
    return Declared("", metavar, help, check)


def option(flag: str, metavar: str, help: str, check: Callable[[Any], Any] | None = None, **more: Any) -> Declared:
    """Declare an option with a value; `more` as in `Declared`."""
    return Declared(flag, metavar, help, check or (_one_of(metavar.split("|")) if "|" in metavar else None), **more)


def flag(name: str, help: str) -> Declared:
    return Declared(name, "", help)


def json_object(text: str | None) -> None:
    """Check for a JSON object."""
    if text is not None and not isinstance(json.loads(text), dict):
        raise ValueError(f"{text} is no JSON object")


def _bundle(folder: Path) -> None:
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is not a bundle: give the folder REPOSITORY/NAME/VERSION")


Bundle = Annotated[Path, argument("BUNDLE", "the folder REPOSITORY/NAME/VERSION", _bundle)]
#: The server's URL and the API key, for all client commands.
Url = Annotated[str, option("--url", "URL", "URL of the server")]
ApiKey = Annotated[str | None, option("--api-key", "KEY", "", envvar="UNROLL_API_KEY", hidden=True)]
Static = Annotated[str | None, option("--static", "JSON", "static inputs of a new session: {name: value}", json_object)]
Json = Annotated[bool, flag("--json", "print one JSON document")]
#: The store, for commands that need one.
Store = Annotated[str, option("--store", "URL", "the store, as for `unroll serve`", envvar="UNROLL_STORE")]


def _one_of(allowed: list[str]) -> Callable[[str | None], None]:
    def check(value: str | None) -> None:
        if value is not None and value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")

    return check


def positive(value: float | None) -> None:
    """Check for a number above 0."""
    if value is not None and not value > 0:
        raise ValueError(f"{value} is not a number above 0")


def not_negative(value: float | None) -> None:
    """Check for a number of at least 0."""
    if value is not None and not value >= 0:
        raise ValueError(f"{value} is below 0")


def parameters(command: type[Runnable]) -> list[click.Parameter]:
    """The options and arguments declared by the fields of a dataclass."""
    hints = get_type_hints(command, include_extras=True)
    return [_parameter(one.name, hints[one.name], one.default) for one in fields(command)]  # type: ignore[arg-type]


def called(command: type[Runnable], values: dict[str, Any]) -> Runnable:
    """Make the command from its values; those of a repeatable option become a list, or None if there are none."""
    return command(**{name: list(one) or None if isinstance(one, tuple) else one for name, one in values.items()})


def _parameter(name: str, hint: Any, default: Any) -> click.Parameter:
    declared: Declared
    kind, declared = get_args(hint)
    several = False
    while members := [member for member in get_args(kind) if member is not type(None)]:  # str | None, list[str]
        several |= get_origin(kind) is list
        kind = type(members[0]) if get_origin(kind) is Literal else members[0]
    given: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
    given |= {
        "callback": _checked(declared.check),
        "envvar": declared.envvar,
        "metavar": declared.metavar,
    }
    if not declared.flags:
        argument = Argument([name], type=_CLICK[kind], nargs=-1 if several else 1, **given)
        argument.help = declared.help
        return argument
    given |= {"is_flag": True} if kind is bool else {"type": _CLICK[kind], "multiple": several}
    found = Option([declared.flags, name], help=declared.help, hidden=declared.hidden, **given)
    found.group, found.show_default = declared.group, declared.show_default
    return found


def _checked(check: Callable[[Any], Any] | None) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"{value} is not a finite number")
            if check is not None:
                check(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
        return value

    return callback
