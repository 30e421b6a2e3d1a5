"""`unroll keys new`: makes an API key, and adds its entry to a file of keys. `unroll keys check` reads a file."""

import argparse
import os
import sys
from pathlib import Path

from unroll.service.access.keys import SCOPES, KeyRing, KeysRefused, new_key

_EPILOG = """\
The key is printed once and is nowhere else: the file has its SHA-256. Servers read the file again at SIGHUP.

exit status: 0  done
             1  the file cannot be used; it is as before"""


def main(argv: list[str]) -> int:
    """Return the exit status that the help describes."""
    parser = argparse.ArgumentParser("unroll keys", description="Make API keys for `unroll serve --keys FILE`.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    kind = argparse.RawDescriptionHelpFormatter
    new = actions.add_parser("new", help="make a key", description="Make a key.", epilog=_EPILOG, formatter_class=kind)
    new.add_argument("file", type=Path, metavar="FILE", help="of keys; it is made if it is not there")
    new.add_argument("--tenant", required=True, help="whose sessions the key reaches: letters, digits, . _ -")
    new.add_argument("--name", help="of the key in the server's log; the tenant by default")
    new.add_argument(
        "--scope", action="append", choices=SCOPES, help="what the key permits; may be repeated (default: infer)"
    )
    check = actions.add_parser("check", help="read a file of keys", description="Read a file of keys.")
    check.add_argument("file", type=Path, metavar="FILE", help="of keys")
    options = parser.parse_args(argv)
    try:
        return _new(options) if options.action == "new" else _check(options.file)
    except (KeysRefused, OSError) as error:
        print(f"unroll keys: {error}", file=sys.stderr)
        return 1


def _new(options: argparse.Namespace) -> int:
    secret, entry = new_key(options.name or options.tenant, options.tenant, options.scope or ["infer"])
    path: Path = options.file
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
    print(secret)
    return 0


def _check(path: Path) -> int:
    ring = KeyRing.read(path)
    for key in ring.keys.values():
        end = "" if key.expires is None else f"  {'expired' if key.is_over() else 'expires'} {key.expires.isoformat()}"
        print(f"{key.name}  tenant {key.tenant}  {' '.join(sorted(key.scopes))}{end}")
    for tenant, quota in ring.quotas.items():
        print(f"tenant {tenant}: " + ", ".join(f"{name} {most:g}" for name, most in quota if most is not None))
    return 0
