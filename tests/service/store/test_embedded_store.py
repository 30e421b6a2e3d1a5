"""The store in a folder: its clock, its refusals, and its content after a crash of the machine."""

import json
import math
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest
from test_stores import KEPT, KEY, ORIGIN, commit, put
from waiting import reached

from unroll.service.core.errors import SnapshotInvalid, StoreUnavailable
from unroll.service.store import embedded_entry, embedded_store, lmdb_folder
from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Tokens
from unroll.service.store.lmdb_folder import LmdbFolder
from unroll.service.store.record import Gone, Record

_PAGE = 4096


class Machine:
    """A boot id, and the seconds since that boot."""

    def __init__(self) -> None:
        self.boot, self.seconds = "one", 1000.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    for module in (lmdb_folder, embedded_entry):
        monkeypatch.setattr(module, "boot", lambda: made.boot)
    for module in (embedded_entry, embedded_store):
        monkeypatch.setattr(module, "since_boot", lambda: made.seconds)
    return made


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


def opened(folder: Path) -> EmbeddedStore:
    return EmbeddedStore(EmbeddedStoreConfig(folder, timeout=5.0, idle_timeout=5.0, tombstone_life=7.0))


async def test_sessions_expire_and_are_forgotten(tmp_path: Path, machine: Machine, tokens: Tokens) -> None:
    store = opened(tmp_path)
    first = tokens.next()
    await put(store, commit(first))
    machine.seconds += 4.0
    await put(store, commit(tokens.next(), first, 3))
    machine.seconds += 4.0
    assert isinstance(await store.load(KEY), Record)
    machine.seconds += 2.0
    for swept in (False, True):
        if swept:
            store._look_after()
        assert await store.load(KEY) == Gone("session_expired", ORIGIN)
        assert await store.close(KEY) is None
    machine.seconds += 7.0
    assert await store.load(KEY) is None
    store._look_after()
    with store._folder.read() as transaction:
        assert [bytes(key) for key, _ in transaction.cursor()] == [b"\0clock"]
    await store.stop()


async def test_many_sessions_expire_together_without_waiting_for_one_scan_a_second(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: Tokens
) -> None:
    monkeypatch.setattr(embedded_store, "_LOOKING_SECONDS", math.inf)
    store = opened(tmp_path)
    await put(store, *[commit(tokens.next(), key=("lstm", f"{number}")) for number in range(1500)])
    machine.seconds += 20.0
    looks: list[int] = []
    monkeypatch.setattr(store, "_look_after", lambda: looks.append(EmbeddedStore._look_after(store)))  # type: ignore
    await store.start()
    await reached(lambda: store._folder._environment.stat()["entries"] == 1, "an empty store")
    assert len(looks) == 1
    await store.stop()


async def test_time_stands_still_while_the_machine_is_off(tmp_path: Path, machine: Machine, tokens: Tokens) -> None:
    store = opened(tmp_path)
    await put(store, commit(tokens.next()))
    machine.seconds += 3.0
    store._look_after()
    await store.stop()
    machine.boot, machine.seconds = "two", 1e9
    store = opened(tmp_path)
    assert isinstance(await store.load(KEY), Record)
    machine.seconds += 3.0
    assert await store.load(KEY) == Gone("session_expired", ORIGIN)
    await store.stop()


@pytest.mark.parametrize("cut", [False, True])
async def test_a_damaged_session_is_not_used_and_can_be_closed(tmp_path: Path, tokens: Tokens, cut: bool) -> None:
    store = opened(tmp_path)
    await put(store, commit(tokens.next()))

    def damage(transaction: lmdb.Transaction) -> None:
        content = bytearray(transaction.get(b"lstm/a"))
        content[-20] ^= 1
        transaction.put(b"lstm/a", bytes(content[:10] if cut else content))

    store._folder.write(damage)
    store._look_after()
    assert (await store.page("", 9)).damaged == [KEY]
    assert store.newer(KEY, b"another token...") is None
    with pytest.raises(SnapshotInvalid, match="not a session of the store" if cut else "damaged"):
        await store.load(KEY)
    with pytest.raises(SnapshotInvalid, match="it is removed"):
        await store.close(KEY)
    assert await put(store, commit(tokens.next())) == [None]
    await store.stop()


async def test_a_session_id_may_be_long(tmp_path: Path, tokens: Tokens) -> None:
    store = opened(tmp_path)
    keys = [("lstm", "\U0001f600" * 128), ("lstm", "\U0001f600" * 127 + "x")]
    assert await put(store, *[commit(tokens.next(), key=key) for key in keys]) == [None, None]
    assert [await store.close(key) for key in keys] == [2, 2]
    await store.stop()


def test_servers_of_two_formats_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LmdbFolder(tmp_path, "never")
    monkeypatch.setattr(lmdb_folder, "FORMAT", 3)
    with pytest.raises(StoreUnavailable, match="a server of another version has it open"):
        LmdbFolder(tmp_path, "never")
    folder.close()
    LmdbFolder(tmp_path, "never").close()
    monkeypatch.undo()
    with pytest.raises(StoreUnavailable, match="has format 3; this server reads formats 1 and 2"):
        LmdbFolder(tmp_path, "never")


def test_unusable_store_folder_is_refused(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LmdbFolder(tmp_path / "store", "everysec")
    with pytest.raises(StoreUnavailable, match="--store-sync everysec"):
        LmdbFolder(tmp_path / "store", "always")
    machine.boot = "another"
    with pytest.raises(StoreUnavailable, match="another machine"):
        LmdbFolder(tmp_path / "store", "everysec")
    machine.boot = "one"
    folder.write(lambda transaction: [transaction.put(b"%d" % i, bytes(2000)) for i in range(200)])
    folder.close()
    data = tmp_path / "store" / "data.mdb"
    data.write_bytes(data.read_bytes()[: 20 * _PAGE])
    with pytest.raises(StoreUnavailable, match="is damaged"):
        LmdbFolder(tmp_path / "store", "everysec")
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        LmdbFolder(tmp_path / "file", "everysec")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    monkeypatch.setattr(lmdb_folder, "_NETWORK", {line.partition(" - ")[2].split()[0] for line in mounts})
    with pytest.raises(StoreUnavailable, match="network file system"):
        LmdbFolder(tmp_path / "other", "everysec")


def test_it_grows_while_another_thread_reads(tmp_path: Path) -> None:
    folder, closed = LmdbFolder(tmp_path, "everysec", map_bytes=2**20), threading.Event()

    def read() -> set[bytes | None]:
        found = set()
        while not closed.is_set():
            found.add(folder.get_at_once(b"0"))
        return found

    with ThreadPoolExecutor(1) as executor:
        reading = executor.submit(read)
        for i in range(40):
            folder.write(lambda transaction, i=i: transaction.put(b"%d" % i, bytes(200_000)))
            folder.mark()
        with folder.read() as transaction:
            assert all(len(transaction.get(b"%d" % i)) == 200_000 for i in range(40))
        folder.close()
        closed.set()
    assert bytes(200_000) in reading.result() <= {None, bytes(200_000)}
    assert folder.get_at_once(b"0") is None


def changed(chance: random.Random, folder: LmdbFolder) -> None:
    keys = [b"%04d" % chance.randrange(400) for _ in range(60)]

    def work(transaction: lmdb.Transaction) -> None:
        for key in keys:
            if chance.random() < 0.2:
                transaction.delete(key)
            else:
                transaction.put(key, chance.randbytes(chance.choice((40, 700, 5000))))

    folder.write(work)


def content(folder: LmdbFolder) -> dict[bytes, bytes]:
    with folder.read() as transaction:
        return {bytes(key): bytes(value) for key, value in transaction.cursor()}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 8))])
def test_store_is_as_of_the_last_sync_after_a_power_loss(tmp_path: Path, machine: Machine, seed: int) -> None:
    """Any subset of the pages changed after the sync may have reached the disk."""
    chance = random.Random(seed)
    folder = LmdbFolder(tmp_path / "store", "everysec")
    data = tmp_path / "store" / "data.mdb"
    for _ in range(30):
        changed(chance, folder)
        if chance.random() < 0.3:
            folder.mark()
    folder.mark()
    expected, synced = content(folder), data.read_bytes()
    for _ in range(chance.choice((1, 2, 3, 30))):
        changed(chance, folder)
    late = data.read_bytes()
    assert content(folder) != expected
    folder.close()
    machine.boot = "two"
    for number in range(5):
        left = tmp_path / f"left-{number}"
        shutil.copytree(tmp_path / "store", left, ignore=shutil.ignore_patterns("data.mdb", "lock.mdb", "synced"))
        (left / "synced").write_bytes(synced[: 2 * _PAGE])
        pages = max(len(synced), len(late)) // _PAGE
        mixed = [chance.choice((synced, late))[i * _PAGE :][:_PAGE].ljust(_PAGE, b"\0") for i in range(pages)]
        (left / "data.mdb").write_bytes(b"".join(mixed))
        found = LmdbFolder(left, "everysec")
        assert content(found) == expected
        changed(chance, found)  # the store is writable
        found.close()


def test_nothing_survives_a_crash_without_a_sync(tmp_path: Path, machine: Machine) -> None:
    folder = LmdbFolder(tmp_path, "never")
    changed(random.Random(1), folder)
    assert json.loads((tmp_path / "host.json").read_text())["sync"] == "never"
    machine.boot = "two"
    folder._environment.close()
    shutil.copytree(tmp_path, copy := tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    found = LmdbFolder(copy, "never")
    assert content(found) == {}
    assert list(copy.glob("data.lost-*"))
    found.close()


async def test_next_sync_of_an_idle_store_clears_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tokens
) -> None:
    monkeypatch.setattr(embedded_store, "_PERIOD", 0.01)
    store = opened(tmp_path / "store")
    await put(store, commit(tokens.next()))
    synced = tmp_path / "store" / "synced"
    synced.unlink()
    synced.mkdir()  # not writable
    await store.start()
    await reached(lambda: not store.figures.up, "a sync that failed")
    synced.rmdir()
    await reached(lambda: store.figures.up, "one that did not")
    await store.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", where], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


async def test_a_full_disk_refuses_steps_and_lets_sessions_close(small_disk: Path, tokens: Tokens) -> None:
    store = opened(small_disk / "store")
    keys = [("lstm", f"s{number}") for number in range(200)]
    opening = [commit(tokens.next(), key=key, row=bytes(1000)) for key in keys]
    assert await put(store, *opening) == [None] * 200
    with (small_disk / "other").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    errors = []
    for number in range(400):
        errors += await store.commit([commit(tokens.next(), key=("lstm", f"large{number}"), row=bytes(100_000))])
    assert isinstance(errors[-1], StoreUnavailable)
    assert [await store.close(key) for key in keys] == [2] * 200
    assert await store.load(keys[0]) == Gone("session_closed", ORIGIN)
    assert await put(store, commit(tokens.next())) == [StoreUnavailable]
    (small_disk / "other").unlink()
    store._look_after()
    assert await put(store, commit(tokens.next(), key=keys[1])) == [None]
    record = await store.load(keys[1])
    assert isinstance(record, Record)
    assert record.kept == KEPT
    await store.stop()
