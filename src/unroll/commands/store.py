"""`unroll store check`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from unroll.commands.options import Json, argument, flag

if TYPE_CHECKING:
    from unroll.service.store.embedded_check import Report


def _folder(url: str) -> None:
    if not url.startswith("file:///"):
        raise ValueError("give a folder, such as file:///var/lib/unroll; Redis checks its own files")


@dataclass(frozen=True)
class Check:
    """Check the format and checksum of every entry of a store in a folder.

    The store may be in use by servers. The exit status is 0 if every entry is sound or was removed by --repair, 1 if
    entries are damaged, and 2 if the store cannot be opened or its file is damaged as a whole.
    """

    store: Annotated[str, argument("URL", "the store, such as file:///var/lib/unroll", _folder)]
    repair: Annotated[bool, flag("--repair", "remove damaged entries")] = False
    json: Json = False

    def run(self) -> int:
        from unroll.service.settings import store_folder
        from unroll.service.store.embedded_check import check

        folder = store_folder(self.store)
        assert folder is not None
        report = check(folder, repair=self.repair)
        print(json.dumps(asdict(report), indent=2)) if self.json else print(*_lines(report), sep="\n")
        return 2 if report.result == "unreadable" else int(len(report.damaged) > report.removed)


def _lines(report: "Report") -> Iterator[str]:
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
