"""What `unroll store check` says of a store in a folder."""

from collections.abc import Iterator

from unroll.service.store.embedded_check import Report


def lines(report: Report) -> Iterator[str]:
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


def status(report: Report) -> int:
    """Return 0 if every entry is sound or was removed, 1 if entries are damaged, 2 if the file as a whole is."""
    if report.result == "unreadable":
        return 2
    return int(len(report.damaged) > report.removed)
