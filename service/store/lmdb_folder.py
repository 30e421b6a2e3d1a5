"""An LMDB database in a folder, shared by the processes of one host, and its recovery after a crash of the machine.

    data.mdb, lock.mdb  LMDB's files
    lock                locked by every process that has the folder open (flock)
    host.json           boot id of the machine and sync mode, of the processes that have or last had the folder open
    synced              LMDB's two meta pages as of the last sync

LMDB never overwrites a page that a reader may still see, and commits by writing a meta page. Therefore a killed process
leaves the last commit intact. A power failure, in contrast, may lose any of the pages written since the last sync. With
`everysec`, each process syncs once a second, saves the meta pages, and protects the pages that they reference from
reuse. After a crash of the machine, the saved meta pages are restored.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

import lmdb
import structlog

from unroll.service.core.choices import Sync
from unroll.service.core.errors import StoreUnavailable

T = TypeVar("T")

_log = structlog.get_logger(__name__)

#: The format of the entries, and those that are read. A server that reads only format 1 refuses the folder.
FORMAT, _READ = 2, (1, 2)
#: Address space, neither memory nor disk. It grows by doubling.
MAP_BYTES = 16 * 2**30
#: Maximum number of concurrent readers, over all processes.
READERS = 512
#: How long opening a folder waits for another process's transaction.
PATIENCE_SECONDS = 5.0
#: Space that is freed when the disk is full, so that sessions can still be closed.
_RESERVE_BYTES = 4 * 2**20
#: Network file systems, where LMDB cannot work: its locks are in local shared memory.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "ocfs2", "gfs2"}
_NETWORK |= {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "virtiofs"}


class LmdbFolder:
    """One open database. Used by one thread at a time, except for `get_at_once`.

    Args:
        folder: Created if it does not exist.
        sync: When commits reach the disk.
        map_bytes: Initial size of the map.
        patience: Seconds to wait for another process's transaction.

    Raises:
        StoreUnavailable: The folder cannot be used, and retrying does not help.
    """

    def __init__(
        self, folder: Path, sync: Sync, map_bytes: int = MAP_BYTES, patience: float = PATIENCE_SECONDS
    ) -> None:
        self.folder, self.sync = folder, sync
        self._map_bytes = map_bytes
        self._held: Any = None  # a reader of the state in `synced`, which protects its pages
        self._marked = -1  # the last transaction of that state
        self._map_lock = Lock()  # the map must not move while another thread reads it
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_other_machines(folder)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"the store {folder} cannot be used: {error.strerror}", 0) from error
        try:
            self._join()
            self._environment = self._open()
            self._await_turn(patience)
            self.reserve()
            self.mark()
        except (lmdb.Error, OSError) as error:
            os.close(self._lock)
            raise StoreUnavailable(f"the store {folder} cannot be used: {error}", 0) from error
        except StoreUnavailable:
            os.close(self._lock)
            raise

    def _await_turn(self, patience: float) -> None:
        """Raises StoreUnavailable if another process does not end its transaction; LMDB would wait forever."""

        def take_a_turn() -> None:
            with self._environment.begin(write=True):
                pass

        turn = Thread(target=take_a_turn, name="first turn", daemon=True)
        turn.start()
        turn.join(patience)
        if turn.is_alive():
            raise StoreUnavailable(
                f"the store {self.folder} is blocked by another process, which has not ended its transaction for "
                f"{patience:g} s: {holders(self.folder)}. Let it continue (kill -CONT) or kill it (kill -KILL), and "
                "start again",
                0,
            )

    # ── transactions ─────────────────────────────────────────────────────────────────────────────

    def write(self, work: Callable[[Any], T]) -> T:
        """Run `work` in a transaction, commit it, and return the result. Raises lmdb.Error if nothing was written."""
        while True:
            try:
                with self._environment.begin(write=True, buffers=True) as transaction:
                    return work(transaction)
            except lmdb.MapResizedError:  # by another process
                self._resize(0)
            except lmdb.MapFullError:
                self._resize(2 * self._environment.info()["map_size"])

    @contextlib.contextmanager
    def read(self) -> Iterator[Any]:
        """A read transaction on the last commit."""
        try:
            transaction = self._environment.begin(buffers=True)
        except lmdb.MapResizedError:
            self._resize(0)
            transaction = self._environment.begin(buffers=True)
        with transaction:
            yield transaction

    def get_at_once(self, place: bytes) -> bytes | None:
        """The last commit's value, for any thread. None if there is none, or if it cannot be read at once."""
        if not self._map_lock.acquire(blocking=False):
            return None
        try:
            with self._environment.begin() as transaction:
                return transaction.get(place)
        except lmdb.Error:
            return None
        finally:
            self._map_lock.release()

    def _resize(self, size: int) -> None:
        self._release()
        with self._map_lock:
            self._environment.set_mapsize(size)
        self.mark()

    # ── the disk ─────────────────────────────────────────────────────────────────────────────────

    def mark(self, *, closing: bool = False) -> None:
        """Make all commits survive a crash of the machine, as far as `sync` promises."""
        environment = self._environment
        if self.sync == "always" or (self.sync == "never" and not closing):
            self._marked = environment.info()["last_txnid"]
            return
        with environment.begin(write=True):  # blocks commits
            last = environment.info()["last_txnid"]
            if last == self._marked and self._held is not None:
                return
            held = environment.begin()
            pages = self._meta_pages()
        environment.sync(True)
        _write(self.folder / "synced", pages)
        self._release()
        self._held, self._marked = held, last
        environment.reader_check()  # only now: a killed process's reader may protect the state in `synced`

    def sizes(self) -> dict[str, int]:
        """Sizes of the file and of the pages in use, in bytes."""
        pages = self._environment.stat()
        used = pages["psize"] * (pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])
        return {"file": _size_of(self.folder / "data.mdb"), "used": used}

    def has_changed(self) -> bool:
        """Whether there are commits since the last mark."""
        return self._environment.info()["last_txnid"] != self._marked

    def free_reserve(self) -> None:
        """Free the reserved space, so that sessions can still be closed."""
        (self.folder / "reserve").unlink(missing_ok=True)

    def reserve(self) -> bool:
        """Reserve disk space. False if there is not enough."""
        path = self.folder / "reserve"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
        except OSError:
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(descriptor)
        return True

    def close(self) -> None:
        self.mark(closing=True)
        self._release()
        with self._map_lock:
            self._environment.close()
        os.close(self._lock)

    def _meta_pages(self) -> bytes:
        size = 2 * self._environment.stat()["psize"]
        with (self.folder / "data.mdb").open("rb") as file:
            return file.read(size)

    def _release(self) -> None:
        if self._held is not None:
            self._held.abort()
            self._held = None

    # ── other processes ──────────────────────────────────────────────────────────────────────────

    def _join(self) -> None:
        """Check compatibility with the processes that have the folder open. If there are none, recover it."""
        ours = {"format": FORMAT, "boot": boot(), "namespace": namespace(), "sync": self.sync}
        path = self.folder / "host.json"
        while True:
            if self._is_alone():
                self._prepare(last_host(self.folder))
                _write(path, json.dumps(ours).encode())
                fcntl.flock(self._lock, fcntl.LOCK_SH)
                return
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            theirs = last_host(self.folder)
            if theirs == ours:
                return
            if theirs is not None and not self._is_alone():
                raise StoreUnavailable(f"the store {self.folder} is in use: {_difference(ours, theirs)}", 0)

    def _is_alone(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _prepare(self, before: dict[str, Any] | None) -> None:
        """Recover the folder if the machine has crashed since its last use."""
        data, synced = self.folder / "data.mdb", self.folder / "synced"
        if before is not None and before["format"] not in _READ:
            raise StoreUnavailable(
                f"the store {self.folder} has format {before['format']}; this server reads formats 1 and {FORMAT}", 0
            )
        if before is not None and has_crashed(before) and data.exists():
            if synced.exists():
                put_back(data, synced)
                _log.warning("the machine was restarted", store=str(self.folder), continues="as of the last sync")
            else:
                lost = data.with_name(f"data.lost-{time.time_ns()}")
                data.rename(lost)
                _log.error("the machine was restarted", store=str(self.folder), lost=str(lost), reason="no sync")
        if self.sync != "everysec":
            synced.unlink(missing_ok=True)
        if data.exists():
            check_size(data)

    def _open(self) -> Any:
        return lmdb.open(
            str(self.folder),
            map_size=max(self._map_bytes, _size_of(self.folder / "data.mdb") * 2),
            sync=self.sync == "always",
            max_readers=READERS,
            mode=0o600,
            readahead=False,
        )


def holders(folder: Path) -> str:
    """The other processes that have the folder open, with their names and states."""
    lock = (folder / "lock").stat().st_ino
    found = []
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{lock}") and int(words[4]) not in (0, os.getpid()):
                status = Path(f"/proc/{words[4]}/status").read_text()
                name, state = (re.search(rf"^{what}:\s*(.*)$", status, re.M) for what in ("Name", "State"))
                found.append(f"process {words[4]}, {name and name[1]}, {state and state[1]}")
    return "; ".join(found) or "its id is unknown here"


def is_store(folder: Path) -> bool:
    return (folder / "data.mdb").is_file()


def last_host(folder: Path) -> dict[str, Any] | None:
    """The content of `host.json`. Raises StoreUnavailable if it is damaged."""
    path = folder / "host.json"
    if not path.exists():
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.keys() >= {"format", "boot", "namespace", "sync"}:
            return found
    text = f"{path} is damaged; remove it if this machine has not been restarted since the last server ended"
    raise StoreUnavailable(text, 0)


def has_crashed(host: dict[str, Any]) -> bool:
    """Whether the machine has restarted since without a sync, so that the file is in an unknown state."""
    return host["boot"] != boot() and host["sync"] != "always"


def put_back(data: Path, synced: Path) -> None:
    """Restore the state of the last sync."""
    with data.open("r+b") as file:
        file.write(synced.read_bytes())
        file.flush()
        os.fsync(file.fileno())


def check_size(data: Path) -> None:
    """Raises StoreUnavailable for a truncated file, which would crash the process, because LMDB maps it as memory."""
    with contextlib.closing(lmdb.open(str(data), subdir=False, readonly=True, lock=False, max_readers=1)) as opened:
        pages, size = opened.info()["last_pgno"] + 1, opened.stat()["psize"]
    if data.stat().st_size < pages * size:
        raise StoreUnavailable(
            f"the store {data.parent} is damaged: data.mdb has {data.stat().st_size} of {pages * size} bytes; move it "
            "away to start with an empty store, or restore a copy",
            0,
        )


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if ours["boot"] != theirs["boot"]:
        return "another machine has it open; a folder serves the processes of one machine"
    if ours["namespace"] != theirs["namespace"]:
        return "a process of another container has it open; use --workers in one container instead"
    if ours["format"] != theirs["format"]:
        return "a server of another version has it open; stop it first"
    return f"with --store-sync {theirs['sync']}; all processes need the same"


def file_system(folder: Path) -> str | None:
    """The type of the folder's file system; None if it is unknown."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return None  # not Linux
    where = str(folder.resolve())
    inside = [words for words in mounts if where == words[4] or where.startswith(words[4].rstrip("/") + "/")]
    kind = max(inside, key=lambda words: len(words[4]))
    return kind[kind.index("-") + 1]


def _refuse_other_machines(folder: Path) -> None:
    """Raises StoreUnavailable if the folder is on a network file system."""
    if (name := file_system(folder)) in _NETWORK:
        raise StoreUnavailable(
            f"the store {folder} is on a network file system ({name}); use a local disk, or --store redis://...", 0
        )


@cache
def boot() -> str:
    """The boot id, which is unique to each start of the machine."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return subprocess.run(
        ["sysctl", "-n", "kern.bootsessionuuid"],  # noqa: S607 its folder varies
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def namespace() -> int:
    """The PID namespace. LMDB identifies processes by their id, which is ambiguous between containers."""
    return os.stat("/proc/self/ns/pid").st_ino if sys.platform == "linux" else 0


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
