"""`unroll store check`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from unroll.commands.options import Json, Store, WrongOption, flag

if TYPE_CHECKING:
    from unroll.service.store.embedded_check import Report


@dataclass(frozen=True)
class Check:
    """Check the format and checksum of every entry of a store in a folder.

    The store may be in use by servers. The exit status is 0 if every entry is sound or was removed by --repair, 1 if
    entries are damaged, and 2 if the store cannot be opened or its file is damaged as a whole.
    """

    store: Store
    repair: Annotated[bool, flag("--repair", "remove damaged entries")] = False
    json: Json = False

    def run(self) -> int:
        if not self.store.startswith("file:///"):
            raise WrongOption("give a folder, such as file:///var/lib/unroll; Redis checks its own files")
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
        f"sessions: {report.sessions} open, {report.closed} closed, {report.expired} expired, "
        f"{len(report.damaged)} damaged; {report.used_bytes} bytes in use, in a file of {report.file_bytes}"
    )
    if report.removed:
        yield f"damaged entries removed: {report.removed}; their sessions are unknown from now on"
    elif report.damaged:
        yield "their sessions cannot be used; --repair removes them, so that their ids can be opened again"
