"""Judges the facts about a store."""

from collections.abc import Iterator, Mapping

from unroll.service.doctor.findings import Finding, Status
from unroll.service.doctor.store import Folder, StoreFacts

_GIB = 2**30
#: Free bytes on the disk of a folder below which there is a note.
_LITTLE = _GIB // 4


def judge_store(facts: StoreFacts) -> Iterator[Finding]:
    if facts.description is not None:
        says = f"{facts.description.kind}, {facts.description.where}; sessions survive {facts.description.survives}"
        yield Finding("store", Status.OK, says)
        yield from _redis(facts.description.settings)
    if facts.folder is not None:
        yield from _folder(facts.folder)
    if facts.problem is not None:
        yield Finding("store", Status.BROKEN, facts.problem, "see `unroll serve --help`, --store")
    elif facts.commit_seconds is not None:
        yield Finding("commits", Status.OK, f"accepted; one takes {facts.commit_seconds * 1e3:.2f} ms (median of 20)")


def _redis(settings: Mapping[str, str]) -> Iterator[Finding]:
    if not settings:
        return
    said = ", ".join(
        f"{name} {settings[name] or 'off'}" for name in ("appendonly", "appendfsync", "save") if name in settings
    )
    if settings["appendonly"] == "yes":
        yield Finding("persistence", Status.OK, said)
    else:
        yield Finding("persistence", Status.NOTE, said, "to lose at most a second in a crash: appendonly yes")
    policy, limit = settings["maxmemory-policy"], settings["maxmemory"]
    says = f"maxmemory {limit}, maxmemory-policy {policy}"
    if policy == "noeviction":
        yield Finding("eviction", Status.OK, says)
    elif limit == "0":
        yield Finding("eviction", Status.NOTE, f"{says}; nothing is removed, because there is no limit", _NO_EVICTION)
    else:
        yield Finding("eviction", Status.NOTE, f"{says}: when memory is full, open sessions are lost", _NO_EVICTION)


_NO_EVICTION = "set maxmemory-policy to noeviction: clients then get 503 instead of losing sessions"


def _folder(folder: Folder) -> Iterator[Finding]:
    disk = f"{folder.free / _GIB:.1f} GiB free" + (f" on {folder.file_system}" if folder.file_system else "")
    yield Finding("disk", *((Status.OK, disk) if folder.free >= _LITTLE else (Status.NOTE, disk, "make room")))
    report = folder.report
    if report is None:
        yield Finding("sessions", Status.NOTE, "no store in the folder yet", "`unroll serve` makes it")
    elif report.result == "unreadable":
        yield Finding("sessions", Status.BROKEN, report.reason, "see `unroll store check`")
    else:
        says = (
            f"{report.sessions} open, {report.closed} closed, {report.expired} expired, {len(report.damaged)} damaged"
        )
        says += f"; {report.used_bytes} bytes, --store-sync {folder.sync}"
        if report.damaged:
            yield Finding("sessions", Status.BROKEN, says, "`unroll store check --repair` removes the damaged ones")
        else:
            yield Finding("sessions", Status.OK, says)
