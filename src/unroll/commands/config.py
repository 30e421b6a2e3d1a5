"""`unroll config show`."""

import json
import re
from dataclasses import make_dataclass
from typing import Any

from unroll.commands.options import Json, WrongOption
from unroll.commands.serve import Serve

_ABOUT = """Show each setting of a server and its origin: a flag, a variable, a file, or the default.

It takes the flags of `unroll serve`. Keys and passwords are masked.
"""


class _Show:
    json: bool
    flags: dict[str, Any]

    def run(self) -> int:
        from unroll.service.sources import SettingsRefused, gather

        flags = {name: value for name, value in self.flags.items() if name != "json"}
        try:
            gathered = gather(flags)
        except SettingsRefused as refused:
            raise WrongOption(str(refused)) from refused
        values = gathered.settings.model_dump(mode="json")
        found = {
            name: {"value": _masked(name, value), "origin": gathered.origins.get(name, "default")}
            for name, value in values.items()
        }
        if self.json:
            print(json.dumps(found, indent=2))
            return 0
        width = max(map(len, found))
        for name, one in found.items():
            print(f"{name:<{width}}  {json.dumps(one['value'])}  ({one['origin']})")
        return 0


def _masked(name: str, value: Any) -> Any:
    if name == "snapshot_keys":
        return ["***" for _ in value]
    if name != "store" or not value or value.startswith("file:"):
        return value
    return re.sub(r"(password=)[^&#]*", r"\1***", re.sub(r"//.*@", "//***@", value))


Show = make_dataclass("Show", [("json", Json, False)], bases=(_Show, Serve))
Show.__doc__ = _ABOUT
