"""`unroll keys new|check`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unroll.commands.options import Failed, Json, argument, option

if TYPE_CHECKING:
    from unroll.service.access.keys import KeyRing

#: The scopes of `unroll.service.access.keys`, repeated because its import is slow.
_SCOPES = ("infer", "metrics", "sessions:admin", "models:admin", "server:admin")
_FILE = argument("FILE", "file of keys, as for `unroll serve --keys`")


def _scopes(words: Sequence[str]) -> None:
    if wrong := [word for word in words if word not in _SCOPES]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(_SCOPES)}")


@dataclass(frozen=True)
class New:
    """Create an API key, and add its entry to a file of keys. The file is created if it does not exist.

    The key is printed once and not stored; the file holds its SHA-256. Servers reload the file on SIGHUP. The exit
    status is 1 if the file is unusable; it is then unchanged.
    """

    file: Annotated[Path, _FILE]
    tenant: Annotated[str, option("--tenant", "TENANT", "owner of the key's sessions: letters, digits, . _ -")]
    name: Annotated[str | None, option("--name", "NAME", "name of the key in messages (default: the tenant)")] = None
    scope: Annotated[
        list[str] | None,
        option(
            "--scope",
            "SCOPE",
            "infer, metrics, sessions:admin, models:admin or server:admin; may be repeated (default: infer)",
            _scopes,
        ),
    ] = None

    def run(self) -> int:
        from unroll.service.access.keys import KeysRefused, add_key

        try:
            print(add_key(self.file, self.name or self.tenant, self.tenant, self.scope or ["infer"]))
        except (KeysRefused, OSError) as error:
            raise Failed(str(error)) from error
        return 0


@dataclass(frozen=True)
class Check:
    """List the keys in a file. The exit status is 1 if the file is unusable.

    A file with tenant quotas but no keys is usable only with `--jwt-keys`; the list says so.
    """

    file: Annotated[Path, _FILE]
    json: Json = False

    def run(self) -> int:
        from unroll.service.access.keys import KeyRing, KeysRefused

        try:
            ring = KeyRing.read(self.file, only_keys=False)
            if ring.keys or not ring.quotas:
                ring = KeyRing.read(self.file)
            print(_document(ring)) if self.json else print(*_lines(ring), sep="\n")
        except KeysRefused as error:
            raise Failed(str(error)) from error
        return 0


def _document(ring: "KeyRing") -> str:
    keys = [key.model_dump(mode="json", exclude={"sha256"}) | {"expired": key.is_over()} for key in ring.keys.values()]
    return json.dumps(
        {"keys": keys, "tenants": {name: quota.model_dump() for name, quota in ring.quotas.items()}}, indent=2
    )


def _lines(ring: "KeyRing") -> Iterator[str]:
    if not ring.keys:
        yield "no keys: for a server with --jwt-keys"
    for key in ring.keys.values():
        end = "" if key.expires is None else f"  {'expired' if key.is_over() else 'expires'} {key.expires.isoformat()}"
        yield f"{key.name}  tenant {key.tenant}  {' '.join(sorted(key.scopes))}{end}"
    for tenant, quota in ring.quotas.items():
        yield f"tenant {tenant}: " + ", ".join(f"{name} {most:g}" for name, most in quota if most is not None)


@dataclass(frozen=True)
class Pair:
    """Create a key pair for signing bundles.

    The private key is written to FILE, for `unroll export --sign`; keep it secret. The public key, for `unroll serve
    --trusted-keys`, is written next to it. Existing files are not replaced.
    """

    file: Annotated[Path, argument("FILE", "file for the private key, such as key.pem")]

    def run(self) -> int:
        from unroll.bundle.signature import KeyUnusable, make_pair

        try:
            print(make_pair(self.file))
        except (KeyUnusable, OSError) as error:
            raise Failed(str(error)) from error
        return 0
