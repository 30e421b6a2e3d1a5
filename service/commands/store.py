"""`unroll store check URL`: examines every entry of a store in a folder, and removes the damaged ones if asked."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from unroll.service.settings import store_folder
from unroll.service.store.embedded_check import Report, check

_EPILOG = """\
exit status: 0  every entry is sound, or was removed by --repair
             1  entries are damaged
             2  the store cannot be opened, or its file as a whole is damaged

Servers may use the store at the same time."""


def main(argv: list[str]) -> int:
    """Return the exit status that the help describes."""
    parser = argparse.ArgumentParser("unroll store", description="Examine the store of durable sessions.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = "compare format and checksum of every entry of a store in a folder"
    action = actions.add_parser(
        "check",
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.add_argument("folder", type=_folder, metavar="URL", help="of the store, such as file:///var/lib/unroll")
    action.add_argument("--repair", action="store_true", help="remove the damaged entries, and nothing else")
    action.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    report = check(options.folder, repair=options.repair)
    print(json.dumps(asdict(report), indent=2)) if options.json else print(*lines(report), sep="\n")
    return _status(report)


def lines(report: Report) -> Iterator[str]:
    """Yield the report in words."""
    if report.result == "unreadable":
        yield f"unreadable: {report.reason}"
        return
    for damage in report.damaged:
        yield f"damaged: model {damage.model!r}, session {damage.session!r}: {damage.problem}"
    yield (
        f"{report.sessions} sessions, {report.closed} closed, {report.expired} expired, {len(report.damaged)} damaged; "
        f"{report.used_bytes} bytes in use, in a file of {report.file_bytes}"
    )
    if report.removed:
        yield f"removed: {report.removed} damaged entries; their sessions are unknown from now on"
    elif report.damaged:
        yield "their sessions cannot be used; --repair removes them, so that their ids can be opened again"


def _status(report: Report) -> int:
    if report.result == "unreadable":
        return 2
    return int(len(report.damaged) > report.removed)


def _folder(url: str) -> Path:
    if (folder := store_folder(url)) is None:
        raise argparse.ArgumentTypeError("give a folder, such as file:///var/lib/unroll; Redis examines its own files")
    return folder


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
