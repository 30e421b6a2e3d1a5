"""The keys file: API keys with their tenants and scopes, and quotas of tenants.

    [[keys]]
    name = "edge"                    # appears in the log
    tenant = "acme"
    scopes = ["infer"]
    sha256 = "9f86d0818…"            # digest of the key, which is not stored
    expires = 2027-06-30T00:00:00Z   # optional

    [tenants.acme]                   # optional; per server process
    sessions = 1000
    streams = 10
    steps_per_second = 5000
    bytes = 100_000_000

A key is 32 random bytes, so its plain SHA-256 cannot be reversed by guessing. Only passwords, which people choose, need
a slow hash.
"""

import fcntl
import hashlib
import os
import secrets
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

Scope = Literal["infer", "metrics", "sessions:admin", "models:admin", "server:admin"]

#: The scopes of keys.
INFER: Scope = "infer"
METRICS: Scope = "metrics"
SESSIONS_ADMIN: Scope = "sessions:admin"
MODELS_ADMIN: Scope = "models:admin"
SERVER_ADMIN: Scope = "server:admin"
SCOPES: tuple[Scope, ...] = (INFER, METRICS, SESSIONS_ADMIN, MODELS_ADMIN, SERVER_ADMIN)

_PREFIX = "unroll_"
_KEY_BYTES = 32
_Tenant = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,32}$")]


class KeysRefused(ValueError):
    """The keys file cannot be used; the message says why."""


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    tenant: _Tenant
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    expires: AwareDatetime | None = None

    def is_over(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


class JwtKey(Key):
    """The permissions of a JWT. signed_by: thumbprint of the key in the JWK set."""

    signed_by: str


class Quota(BaseModel):
    """A tenant's limits in one server process; None for no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sessions: PositiveInt | None = None
    streams: PositiveInt | None = None
    steps_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    bytes: PositiveInt | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: Annotated[list[Key], Field(min_length=1)]
    tenants: dict[_Tenant, Quota] = {}


class _FileBesideJwts(_File):
    keys: list[Key] = []


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Keys by digest, and quotas by tenant."""

    keys: dict[bytes, Key]
    quotas: dict[str, Quota]

    @classmethod
    def read(cls, path: Path, *, only_keys: bool = True) -> "KeyRing":
        """Read a keys file. only_keys: JWTs are not accepted, so there must be a key. Raises KeysRefused."""
        kind = _File if only_keys else _FileBesideJwts
        try:
            file = kind.model_validate(tomllib.loads(path.read_text("utf-8")))
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
            lines = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:3]]
            raise KeysRefused(f"{path}: {'; '.join(lines)}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise KeysRefused(f"{path}: {error}") from None
        keys = {bytes.fromhex(key.sha256): key for key in file.keys}
        if len(keys) < len(file.keys):
            raise KeysRefused(f"{path}: two keys have the same sha256")
        without_key = file.tenants.keys() - {key.tenant for key in file.keys}
        if only_keys and without_key:
            raise KeysRefused(f"{path}: no key belongs to the tenant {sorted(without_key)[0]!r}")
        return cls(keys, file.tenants)

    def find(self, secret: bytes) -> Key | None:
        """The key, or None if it is unknown or expired. The lookup by digest leaks no timing about other keys."""
        key = self.keys.get(hashlib.sha256(secret).digest())
        return None if key is None or key.is_over() else key


def new_key(name: str, tenant: str, scopes: Sequence[str]) -> tuple[str, str]:
    """Create a key, and its entry for the file. Raises KeysRefused."""
    secret = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    try:
        key = Key.model_validate({"name": name, "tenant": tenant, "scopes": [*scopes], "sha256": digest})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise KeysRefused(f"{fault['loc'][0]}: {fault['msg']}") from None
    listed = ", ".join(f'"{scope}"' for scope in SCOPES if scope in key.scopes)
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    return secret, f'[[keys]]\nname = "{quoted}"\ntenant = "{tenant}"\nscopes = [{listed}]\nsha256 = "{digest}"\n'


def add_key(path: Path, name: str, tenant: str, scopes: Sequence[str]) -> str:
    """Add a new key to the file, creating it if necessary. Returns the key. Raises KeysRefused, OSError."""
    secret, entry = new_key(name, tenant, scopes)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two processes would each remove the other's key
        _append(path, entry)
    finally:
        os.close(folder)
    return secret


def _append(path: Path, entry: str) -> None:
    before = ""
    if path.exists():
        KeyRing.read(path)
        before = path.read_text("utf-8").rstrip("\n") + "\n\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.touch(mode=0o600)
        draft.write_text(before + entry, "utf-8")
        KeyRing.read(draft)
        if path.exists():
            draft.chmod(path.stat().st_mode & 0o777)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
