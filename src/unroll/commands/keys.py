"""`unroll keys new|check`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unroll.commands.options import Failed, argument, option

if TYPE_CHECKING:
    from unroll.service.access.keys import KeyRing

#: Those of `unroll.service.access.keys`, which takes long to import.
_SCOPES = ("infer", "metrics", "sessions:admin", "models:admin", "server:admin")
_FILE = argument("FILE", "file of keys, as for `unroll serve --keys`")


def _scopes(words: Sequence[str]) -> None:
    if wrong := [word for word in words if word not in _SCOPES]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(_SCOPES)}")


@dataclass(frozen=True)
class New:
    """Make an API key, and add its entry to a file of keys, which is made if it is not there.

    The key is printed once and is nowhere else: the file has its SHA-256. Servers read the file again at SIGHUP. The
    exit status is 1 if the file cannot be used; it is then as before.
    """

    file: Annotated[Path, _FILE]
    tenant: Annotated[str, option("--tenant", "TENANT", "whose sessions the key reaches: letters, digits, . _ -")]
    name: Annotated[str | None, option("--name", "NAME", "of the key, in messages (default: the tenant)")] = None
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
    """Read a file of keys, and list them. The exit status is 1 if it cannot be used.

    A file with quotas of tenants and no keys can be used with `--jwt-keys` only, and the list says so.
    """

    file: Annotated[Path, _FILE]

    def run(self) -> int:
        from unroll.service.access.keys import KeyRing, KeysRefused

        try:
            ring = KeyRing.read(self.file, only_keys=False)
            if ring.keys or not ring.quotas:
                ring = KeyRing.read(self.file)
            print(*_lines(ring), sep="\n")
        except KeysRefused as error:
            raise Failed(str(error)) from error
        return 0


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
    """Make a pair of keys that sign bundles.

    FILE gets the private key, which `unroll export --sign` uses; keep it secret. The public key, for `unroll serve
    --trusted-keys`, is written next to it. No file is replaced.
    """

    file: Annotated[Path, argument("FILE", "file of the private key, such as key.pem")]

    def run(self) -> int:
        from unroll.bundle.signature import KeyUnusable, make_pair

        try:
            print(make_pair(self.file))
        except (KeyUnusable, OSError) as error:
            raise Failed(str(error)) from error
        return 0
