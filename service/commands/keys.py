"""Makes API keys, and adds their entries to a file of keys."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from unroll.service.access.keys import KeyRing, new_key


def add(path: Path, name: str, tenant: str, scopes: Sequence[str]) -> str:
    """Add an entry to the file, which is made if it is not there. Returns the key. Raises KeysRefused, OSError."""
    secret, entry = new_key(name, tenant, scopes)
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
    return secret


def lines(ring: KeyRing) -> Iterator[str]:
    if not ring.keys:
        yield "no keys: for a server with --jwt-keys"
    for key in ring.keys.values():
        end = "" if key.expires is None else f"  {'expired' if key.is_over() else 'expires'} {key.expires.isoformat()}"
        yield f"{key.name}  tenant {key.tenant}  {' '.join(sorted(key.scopes))}{end}"
    for tenant, quota in ring.quotas.items():
        yield f"tenant {tenant}: " + ", ".join(f"{name} {most:g}" for name, most in quota if most is not None)
