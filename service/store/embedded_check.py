"""Checks every entry of an embedded store, even while servers use it, and can remove damaged entries.

LMDB trusts its pages and reads them as mapped memory, so a damaged page can crash the reading process. Therefore a
child process (this module, run as a program) does the work, and its death by a signal is a result.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lmdb

from unroll.service.core.errors import SnapshotInvalid, StoreUnavailable
from unroll.service.store import lmdb_folder
from unroll.service.store.embedded_entry import (
    CLOCK,
    CLOSED,
    SESSION,
    TIME,
    Entry,
    key_of,
    place_of,
    since_boot,
    this_boot,
)
from unroll.service.store.lmdb_folder import LmdbFolder
from unroll.service.telemetry import logs

#: Offset of the transaction id in a meta page. Commits alternate between two pages, so their ids are consecutive.
_TRANSACTION = 144


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged entry. place: LMDB's key, hexadecimal."""

    model: str
    session: str
    problem: str
    place: str


@dataclass(slots=True)
class Report:
    """The result of a check.

    Attributes:
        result: `unreadable` if the file as a whole is damaged or cannot be opened.
        sessions, closed, expired: Number of sound entries: open sessions, and traces of ended ones.
        removed: Number of damaged entries that were removed.
        file_bytes, used_bytes: Size of the file, and of the pages in use.
    """

    result: Literal["sound", "damaged", "unreadable"] = "sound"
    reason: str = ""
    sessions: int = 0
    closed: int = 0
    expired: int = 0
    damaged: list[Damage] = field(default_factory=list)
    removed: int = 0
    file_bytes: int = 0
    used_bytes: int = 0


def check(folder: Path, *, repair: bool = False) -> Report:
    """Check the store in a folder in a child process; `repair` removes damaged entries."""
    # -P: modules in the current directory must not shadow ours.
    command = [sys.executable, "-P", "-m", __name__, str(folder), *(["repair"] if repair else [])]
    ran = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(ran.stdout)
    except ValueError:
        return Report("unreadable", f"the file is damaged: {_ending(ran)}; {_REMEDY}")
    return Report(**found | {"damaged": [Damage(**damage) for damage in found["damaged"]]})


_REMEDY = "move it away to start with an empty store, or restore a copy"


def _ending(ran: "subprocess.CompletedProcess[str]") -> str:
    if ran.returncode < 0:
        return f"reading it ended the process ({signal.Signals(-ran.returncode).name})"
    return (ran.stderr.strip() or f"exit status {ran.returncode}").splitlines()[-1]


# ── in the child ─────────────────────────────────────────────────────────────────────────────────


def examine(folder: Path, *, repair: bool = False) -> Report:
    """Like `check`, but in this process, which a damaged file may crash."""
    report = Report()
    try:
        with _opened(folder) as environment:
            report.file_bytes = (folder / "data.mdb").stat().st_size
            _walk(environment, report)
        if repair and report.damaged:
            report.removed = _remove(folder, [bytes.fromhex(damage.place) for damage in report.damaged])
    except StoreUnavailable as error:
        report.result, report.reason = "unreadable", error.message
    except (lmdb.Error, OSError, struct.error) as error:
        report.result, report.reason = "unreadable", f"the store {folder} cannot be read: {error}; {_REMEDY}"
    return report


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """Open the database read-only, in the state that the next server would find. Raises StoreUnavailable."""
    if not lmdb_folder.is_store(folder):
        raise StoreUnavailable(f"there is no store in {folder}: no data.mdb", 0)
    with contextlib.ExitStack() as stack:
        last, synced = lmdb_folder.last_host(folder), folder / "synced"
        if last is not None and lmdb_folder.has_crashed(last):
            if not synced.exists():
                raise StoreUnavailable(
                    "the machine was restarted, and nothing was synced: the next server sets it aside", 0
                )
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            shutil.copyfile(folder / "data.mdb", copy / "data.mdb")
            lmdb_folder.put_back(copy / "data.mdb", synced)
            folder = copy
        elif last is not None and last["namespace"] != lmdb_folder.namespace() and _is_in_use(folder):
            raise StoreUnavailable("a process of another container has it open; run the check in that container", 0)
        lmdb_folder.check_size(folder / "data.mdb")
        locks = os.access(folder / "lock.mdb", os.W_OK)
        room = max(lmdb_folder.MAP_BYTES, 2 * (folder / "data.mdb").stat().st_size)  # servers may enlarge it
        environment = lmdb.open(
            str(folder), room, readonly=True, lock=locks, max_readers=lmdb_folder.READERS, create=False
        )
        stack.enter_context(contextlib.closing(environment))
        _check_transactions(folder / "data.mdb", synced)
        yield environment


def _is_in_use(folder: Path) -> bool:
    with (folder / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _check_transactions(data: Path, synced: Path) -> None:
    """Raises StoreUnavailable if LMDB would fall back to an earlier state, which looks sound."""
    for _ in range(5):  # servers may commit between the two reads
        numbers = _transactions(data)
        if abs(numbers[0] - numbers[1]) == 1 or max(numbers) == 0:
            break
    else:
        raise StoreUnavailable(f"the file is damaged: its last two transactions are {numbers}; {_REMEDY}", 0)
    if synced.exists() and max(numbers) < max(_transactions(synced)):
        raise StoreUnavailable(f"the file is damaged: it is older than its last sync; {_REMEDY}", 0)


def _transactions(meta_pages: Path) -> tuple[int, int]:
    size = os.sysconf("SC_PAGE_SIZE")
    with meta_pages.open("rb") as file:
        content = file.read(2 * size)
    (first,), (second,) = (struct.unpack_from("<Q", content, at + _TRANSACTION) for at in (0, size))
    return first, second


def _walk(environment: Any, report: Report) -> None:
    with environment.begin(buffers=True) as transaction:
        pages = transaction.stat()
        report.used_bytes = pages["psize"] * (pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])
        now = _now(transaction.get(CLOCK))
        before, count = b"", 0
        for key, value in transaction.cursor():
            place, content, count = bytes(key), bytes(value), count + 1
            # A lookup uses the keys of the pages above, which have no checksum.
            if place <= before or transaction.get(place) != content:
                raise StoreUnavailable(f"the file is damaged: its entries are out of order; {_REMEDY}", 0)
            before = place
            if place != CLOCK:
                _note(report, place, content, now)
        if count != pages["entries"]:
            text = f"the file is damaged: it has {count} of {pages['entries']} entries; {_REMEDY}"
            raise StoreUnavailable(text, 0)


def _now(clock: Any) -> float:
    if clock is None:
        return 0.0
    boot, offset, last = TIME.unpack(clock)
    return offset + since_boot() if boot == this_boot() else last


def _note(report: Report, place: bytes, content: bytes, now: float) -> None:
    try:
        entry = Entry.read(content)
        entry.record() if entry.kind == SESSION else entry.gone()
        if place_of(entry.name) != place:
            raise SnapshotInvalid("the entry belongs to another session")
    except SnapshotInvalid as error:
        report.damaged.append(Damage(*key_of(place), str(error), place.hex()))
        report.result = "damaged"
        return
    if entry.is_living(now):
        report.sessions += 1
    elif entry.kind == CLOSED:
        report.closed += 1
    else:
        report.expired += 1


def _remove(folder: Path, places: list[bytes]) -> int:
    """Remove those entries that are still damaged. Returns their number."""

    def work(transaction: Any) -> int:
        count = 0
        for place in places:
            again = Report()
            if (content := transaction.get(place)) is not None:
                _note(again, place, bytes(content), 0.0)
            count += bool(again.damaged) and transaction.delete(place)
        return count

    last = lmdb_folder.last_host(folder)
    opened = LmdbFolder(folder, "always" if last is None else last["sync"])
    try:
        return opened.write(work)
    finally:
        opened.close()


if __name__ == "__main__":
    logs.configure_embedded()  # on stderr
    print(json.dumps(asdict(examine(Path(sys.argv[1]), repair=sys.argv[2:] == ["repair"]))))
