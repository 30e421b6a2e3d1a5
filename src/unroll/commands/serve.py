"""`unroll serve`: an option for each setting of the server."""

from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any

from unroll.commands.options import option
from unroll.service.descriptions import GROUPS, Description

_ABOUT = """Serve a repository of bundles.

A setting is a flag; else a variable of the environment, UNROLL_ and its name, such as UNROLL_MAX_BATCH; else a line of
the file of --config, such as max_batch = 64. `unroll config show` prints each, and where it was set.
"""


def _setting(name: str, description: Description, group: str) -> tuple[str, Any, Any]:
    """The field of an option: its words, as `unroll.service.sources` reads them."""
    kind = list[str] | None if description.several else str | None if description.metavar else bool
    default = f" (default: {description.default})" if description.default else ""
    declared = option(
        f"--{name.replace('_', '-')}",
        description.metavar or "SWITCH",
        description.about + default,
        rich_help_panel=group,
        show_default=False,
        check=lambda _: None,
    )
    return name, Annotated[kind, declared], field(default=None if description.metavar else False)


SETTINGS = [_setting(name, one, group) for group, settings in GROUPS.items() for name, one in settings.items()]
CONFIG = Description("FILE", "file of settings, in TOML (or $UNROLL_CONFIG)")


class _Settings:
    """The flags that were given."""

    @property
    def flags(self) -> dict[str, Any]:
        """What was given, by setting."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in given.items() if value not in (None, False)}

    def run(self) -> int:
        from unroll.service.serve import main

        return main(self.flags)


Serve = make_dataclass("Serve", [_setting("config", CONFIG, ""), *SETTINGS], bases=(_Settings,))
Serve.__doc__ = _ABOUT
