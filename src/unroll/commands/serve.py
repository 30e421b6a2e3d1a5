"""`unroll serve`, with an option for each setting of the server."""

from dataclasses import fields, make_dataclass
from typing import Annotated, Any

from unroll.commands.options import Declared, WrongOption
from unroll.service.descriptions import GROUPS, Description

_ABOUT = """Serve a repository of bundles.

Settings come from flags, then from environment variables such as UNROLL_MAX_BATCH, then from the file of --config, with
lines such as max_batch = 64. `unroll config show` prints each setting and its origin.
"""


def _setting(name: str, description: Description, group: str) -> tuple[str, Any, Any]:
    """The dataclass field of a setting; its value is text, which `unroll.service.sources` parses."""
    word = name.replace("_", "-")
    default = f" (default: {description.default})" if description.default else ""
    switch = description.metavar in {"", "no"}
    kind: Any = bool if switch else list[str] if description.several else str
    declared = Declared(
        f"--{word}/--no-{word}" if description.metavar == "no" else f"--{word}",
        "" if switch else description.metavar,
        description.about + default,
        group=group or None,
        show_default=False,
    )
    return name, Annotated[kind | None, declared], None


SETTINGS = [_setting(name, one, group) for group, settings in GROUPS.items() for name, one in settings.items()]
CONFIG = Description("FILE", "file of settings, in TOML (or $UNROLL_CONFIG)")


class _Settings:
    """The settings given as flags."""

    @property
    def flags(self) -> dict[str, Any]:
        """The given values, by setting."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in given.items() if value is not None}

    def run(self) -> int:
        from unroll.service.sources import SettingsRefused, exposed, gather

        try:
            settings = gather(self.flags).settings
        except SettingsRefused as refused:
            raise WrongOption(str(refused)) from refused
        from unroll.service.serve import main  # slow to import: check the settings first

        return main(settings, exposed(self.flags))


Serve = make_dataclass("Serve", [_setting("config", CONFIG, ""), *SETTINGS], bases=(_Settings,))
Serve.__doc__ = _ABOUT
