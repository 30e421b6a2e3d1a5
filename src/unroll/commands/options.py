"""How commands declare their options, and what they raise for a wrong one."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

#: The URL of the server, of every command that is a client.
Url = Annotated[str, typer.Option("--url", metavar="URL", help="URL of the server")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
LOCAL = "http://127.0.0.1:8000"


class Failed(Exception):
    """The command cannot do what it was asked; the message says why, and what to do."""

    status = 1


class WrongOption(Failed):
    """An argument or an option is wrong, as only the command itself can tell."""

    status = 2


def argument(metavar: str, help: str, **more: Any) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False, **more)


def option(flag: str, metavar: str, help: str, check: Callable[[Any], Any] | None = None, **more: Any) -> Any:
    """An option with a value.

    Args:
        metavar: What the value is; words with | between them are all that is allowed.
        check: Gets the value, and raises ValueError with the reason if it is not allowed.
        **more: Other arguments of `typer.Option`; its `rich_help_panel` is the heading below which help lists it.
    """
    check = check or (_one_of(metavar.split("|")) if "|" in metavar else None)
    return typer.Option(flag, metavar=metavar, help=help, callback=_checked(check), **more)


def flag(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, **more)


def _one_of(allowed: list[str]) -> Callable[[str | None], None]:
    def check(value: str | None) -> None:
        if value is not None and value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")

    return check


def positive(value: float | None) -> None:
    """A number that is finite and above 0."""
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{value} is not a number above 0")


def _checked(check: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    if check is None:
        return None

    def callback(value: Any) -> Any:
        try:
            check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return callback
