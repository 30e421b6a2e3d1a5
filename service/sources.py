"""Reads settings: a flag takes precedence over a variable `UNROLL_*`, the file of `--config`, and the default.

Malformed words are reported here, so that a mistyped value does not wait for the import of pydantic.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unroll.service.descriptions import PREFIX, SETTINGS

if TYPE_CHECKING:
    from unroll.service.settings import Settings
    from unroll.service.store.opening import StoreConfig

#: The variable equivalent to `--config`.
CONFIG = f"{PREFIX}CONFIG"
#: Variables that are not settings: of tests, of workers, and those that Kubernetes sets for a Service `unroll…`.
_NO_SETTING = re.compile(
    r"UNROLL_(API_KEY|CONFIG|WORKER|FAILPOINTS|CRDS|TEST_\w+|(\w+_)?SERVICE_(HOST|PORT\w*)|(\w+_)?PORT_\d+_(TCP|UDP|SCTP)\w*)"
)
#: Settings whose values are secret or may contain a password. `@FILE` stands for the lines of a file.
SECRET = frozenset({"snapshot_keys", "store"})
#: Minimum value and description of each numeric form in `descriptions.py`.
_NUMBERS = {
    "N": (1, "a whole number above 0"),
    "PORT": (0, "a port: a whole number from 0 to 65535"),
    "BYTES": (0, "a whole number of bytes"),
    "SECONDS": (0, "a finite number of seconds, 0 or more"),
    "SHARE": (0, "a number above 0, at most 1"),
}
#: Settings that accept words other than the form shown in help.
_OTHER_WORDS = {"durability", "max_connections", "session_capacity"}
_OBJECT = 'JSON such as {"co2": 1}, or co2=1 in a flag'


class SettingsRefused(Exception):
    """Flags, variables or the file are invalid; the message has one line per problem."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """The settings, and the origin of each non-default one: its flag, variable or file."""

    settings: "Settings"
    origins: Mapping[str, str]


def gather(flags: Mapping[str, Any]) -> Gathered:
    """Read the settings from all sources.

    Args:
        flags: Values of flags by setting: a word, True, or the words of a repeatable flag; and the file, as `config`.

    Raises:
        SettingsRefused: A value is not allowed, or there is no such setting.
    """
    if unknown := [_about_unknown(name) for name in _unknown_variables(os.environ)]:
        raise SettingsRefused("\n".join(unknown))
    path = flags.get("config", os.environ.get(CONFIG))
    in_file = {} if path is None else _read(path)
    variables = _variables(os.environ)
    by_flag = {name: value for name, value in flags.items() if name != "config"}
    origins = {name: f"{path}: {name}" for name in in_file}
    origins |= {name: f"{PREFIX}{name.upper()}" for name in variables} | {name: _flag(name) for name in by_flag}
    values = in_file | {name: _of_variable(name, word) for name, word in variables.items() if name not in by_flag}
    values |= {name: _of_flag(name, value) for name, value in by_flag.items()}
    values |= {name: _from_files(values[name], origins[name]) for name in SECRET & values.keys()}
    misfits = {name: reason for name, value in values.items() if (reason := _misfit(name, value))}
    lines = [_about_value(name, {"msg": reason, "input": values[name]}, origins) for name, reason in misfits.items()]
    if "repository" not in values:
        lines.append(_about_value("repository", {"msg": "", "type": "missing"}, origins))
    if lines:
        raise SettingsRefused("\n".join(lines))
    from pydantic import ValidationError

    from unroll.service.settings import Settings

    try:
        return Gathered(Settings(**values), origins)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [_about_value(str((*problem["loc"], "")[0]), problem, origins) for problem in problems]
        raise SettingsRefused("\n".join(lines)) from None


def exposed(flags: Mapping[str, Any]) -> list[str]:
    """The flags that contain a secret, which every user of the machine can see in the process list."""
    words = {name: [value] if isinstance(value, str) else value for name, value in flags.items() if name in SECRET}
    return [
        _flag(name)
        for name, given in words.items()
        if not all(word.startswith("@") for word in given) and (name != "store" or _has_password(given[0]))
    ]


def _has_password(url: str) -> bool:
    return "@" in url.partition("://")[2] or "password=" in url


def _from_files(value: Any, origin: str) -> Any:
    """A secret or a list of secrets, with each `@FILE` replaced by the file's lines. Raises SettingsRefused."""
    if isinstance(value, str):
        return _lines(value, origin)[0] if value.startswith("@") else value
    if not isinstance(value, list):
        return value
    parts = [_lines(item, origin) if str(item).startswith("@") else [item] for item in value]
    return [secret for part in parts for secret in part]


def _lines(word: str, origin: str) -> list[str]:
    """Raises SettingsRefused."""
    path = Path(word[1:])
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsRefused(f"{origin}: the file after @ cannot be read: {reason}") from None
    if not lines:
        raise SettingsRefused(f"{origin}: the file {path} is empty")
    return lines


def store_config_of(url: str, **flags: str | None) -> "StoreConfig":
    """The store config that a server with this `--store`, these flags and this environment would use, for tools.

    Raises:
        SettingsRefused: A value is not allowed.
        StoreUnavailable: The folder's `host.json` is damaged.
    """
    from unroll.service.store.embedded_store import EmbeddedStoreConfig
    from unroll.service.store.lmdb_folder import last_host

    given = {name: value for name, value in flags.items() if value is not None}
    config = gather({"repository": ".", "store": url, "store_timeout": "5"} | given).settings.store_config()
    assert config is not None
    if isinstance(config, EmbeddedStoreConfig) and (last := last_host(config.folder)) is not None:
        return replace(config, sync=last["sync"])
    return config


def _read(path: str) -> dict[str, Any]:
    """The settings in the file. Raises SettingsRefused."""
    if path == "":
        raise SettingsRefused(f"{CONFIG}: it is empty; remove it or give it a value")
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsRefused(f"{path} cannot be read as a settings file: {error}") from None
    if unknown := [name for name in found if name not in SETTINGS]:
        raise SettingsRefused("\n".join(f"{path}: {_no_setting(name)}" for name in unknown))
    return found


def _of_variable(name: str, word: str) -> Any:
    """The value of a variable; lists and objects are JSON. Raises SettingsRefused."""
    return _json(name, word, {"input": word}, f"{PREFIX}{name.upper()}") if SETTINGS[name].several else word


def _of_flag(name: str, value: Any) -> Any:
    """The value of a flag; lists and objects are JSON, or items as words. Raises SettingsRefused."""
    if not isinstance(value, list):
        return value
    items: list[Any] = []
    for word in value:
        found = _json(name, word, {}, _flag(name)) if word.startswith(("[", "{")) else word.split(",")
        items += found.items() if isinstance(found, dict) else found
    if name != "serve":
        return items
    if wrong := [item for item in items if not isinstance(item, str | tuple)]:
        raise SettingsRefused(
            _about_value(name, {"msg": f"it is not {_OBJECT}", "input": wrong[0]}, {name: _flag(name)})
        )
    return dict(item.partition("=")[::2] if isinstance(item, str) else item for item in items)


def _json(name: str, word: str, problem: Mapping[str, Any], origin: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        form = _OBJECT if name == "serve" else "a JSON list"
        raise SettingsRefused(_about_value(name, {"msg": f"it is not {form}", **problem}, {name: origin})) from None


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    found = {
        name.upper().removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.upper().startswith(PREFIX)
    }
    return {name: value for name, value in found.items() if name in SETTINGS}


def _unknown_variables(environment: Mapping[str, str]) -> list[str]:
    known = {name.upper() for name in SETTINGS}
    return [
        name
        for name, value in environment.items()
        if name.upper().startswith(PREFIX)
        and name.upper().removeprefix(PREFIX) not in known
        and not _NO_SETTING.fullmatch(name.upper())
        and not (name.endswith("_PORT") and "://" in value)
    ]


def _about_unknown(name: str) -> str:
    known = [field.upper() for field in SETTINGS]
    nearest = get_close_matches(name.upper().removeprefix(PREFIX), known, n=1)
    return f"{name}: there is no such setting" + "".join(f"; did you mean {PREFIX}{other}?" for other in nearest)


def _no_setting(name: str) -> str:
    nearest = get_close_matches(name.replace("-", "_"), SETTINGS, n=1)
    return f"there is no setting {name!r}" + "".join(f"; did you mean {other}?" for other in nearest)


def _misfit(name: str, value: Any) -> str | None:
    """The problem with a value, as far as its form in help reveals it; `settings.py` has the limits."""
    form = SETTINGS[name].metavar
    if form in _NUMBERS and isinstance(value, str | int | float):
        minimum, description = _NUMBERS[form]
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        fits = "whole" not in description or number.is_integer()
        return None if math.isfinite(number) and number >= minimum and fits else f"it is not {description}"
    allowed = form.split("|")
    if len(allowed) > 1 and name not in _OTHER_WORDS and isinstance(value, str) and value not in allowed:
        return f"it is not one of {', '.join(allowed)}"
    return None


def _about_value(name: str, problem: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """A line about an invalid value: its origin, the value unless it is secret, and the permitted values."""
    reason = problem["msg"].removeprefix("Value error, ")
    if name not in SETTINGS:
        return reason
    about = SETTINGS[name].about
    if problem.get("type") == "missing":
        return f"{_flag(name)}: required; use the flag, or set {PREFIX}{name.upper()} ({about})"
    value = "" if name in SECRET or "input" not in problem else f" {problem['input']!r:.80}"
    return f"{origins.get(name, name)}{value}: {reason} ({about})"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
