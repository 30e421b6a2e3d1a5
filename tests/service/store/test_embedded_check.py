"""`unroll store check` examines every entry and reports a damaged file in words."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lmdb
import pytest
from test_stores import commit, put

from unroll import cli
from unroll.service.core.choices import Sync
from unroll.service.core.errors import SnapshotInvalid
from unroll.service.store import embedded_check, lmdb_folder
from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Tokens
from unroll.service.store.record import Record

#: The seed of the random damage; printed on failure.
SEED, COUNT = 1, 80


async def filled(folder: Path, count: int, row: bytes = bytes(64)) -> EmbeddedStore:
    """A store with sessions; the first one is closed."""
    store, tokens = EmbeddedStore(EmbeddedStoreConfig(folder, timeout=60.0)), Tokens()
    for number in range(count):
        assert await put(store, commit(tokens.next(), key=("lstm", f"s{number}"), row=row)) == [None]
    await store.close(("lstm", "s0"))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checked(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["store", "check", "--store", f"file://{folder}", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


async def test_damaged_entries_are_named_and_removed_while_a_server_uses_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = await filled(tmp_path, 5)

    def damage(transaction: lmdb.Transaction) -> None:
        content = bytearray(transaction.get(b"lstm/s3"))
        content[-20] ^= 1
        transaction.put(b"lstm/s3", bytes(content))
        transaction.put(b"lstm/s9", transaction.get(b"lstm/s2"))

    store._folder.write(damage)
    status, report = checked(tmp_path, capsys)
    assert (status, report["sessions"], report["closed"], report["result"]) == (1, 3, 1, "damaged")
    assert [(found["model"], found["session"]) for found in report["damaged"]] == [("lstm", "s3"), ("lstm", "s9")]
    assert "checksum" in report["damaged"][0]["problem"]
    with pytest.raises(SnapshotInvalid):
        await store.load(("lstm", "s3"))
    assert checked(tmp_path, capsys, "--repair")[1]["removed"] == 2
    assert [await store.load(("lstm", session)) for session in ("s3", "s9")] == [None, None]
    assert isinstance(await store.load(("lstm", "s2")), Record)
    assert cli.main(["store", "check", "--store", f"file://{tmp_path}"]) == 0
    assert "sessions: 3 open, 1 closed, 0 expired, 0 damaged" in capsys.readouterr().out
    await store.stop()


async def test_file_that_kills_its_reader_is_reported_as_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await (await filled(tmp_path, 3, row=bytes(9000))).stop()
    data = tmp_path / "data.mdb"
    content = bytearray(data.read_bytes())
    at = content.find(b"lstm/s1")
    while at >= 0:
        content[at - 5] |= 0x40  # the entry's length now exceeds the file
        at = content.find(b"lstm/s1", at + 1)
    data.write_bytes(content)
    status, report = checked(tmp_path, capsys)
    assert (status, report["result"]) == (2, "unreadable")
    assert "reading it ended the process (SIG" in report["reason"]


async def test_foreign_or_truncated_file_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no store" in checked(tmp_path, capsys)[1]["reason"]
    await (await filled(tmp_path, 30)).stop()
    data = tmp_path / "data.mdb"
    data.write_bytes(data.read_bytes()[:-20000])
    status, report = checked(tmp_path, capsys)
    assert status == 2
    assert "is damaged: data.mdb has" in report["reason"]


@pytest.mark.parametrize("sync", ["everysec", "never"])
async def test_check_after_a_reboot_covers_the_last_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Sync
) -> None:
    store, tokens = EmbeddedStore(EmbeddedStoreConfig(tmp_path / "store", sync, timeout=60.0)), Tokens()
    await put(store, commit(tokens.next(), key=("lstm", "synced")))
    store._look_after()
    await put(store, commit(tokens.next(), key=("lstm", "not synced")))
    left = shutil.copytree(tmp_path / "store", tmp_path / "left", ignore=shutil.ignore_patterns("lock.mdb"))
    await store.stop()
    monkeypatch.setattr(lmdb_folder, "boot", lambda: "another")
    before = contents(left)
    report = embedded_check.examine(left)
    assert contents(left) == before, "it changes nothing"
    if sync == "everysec":
        assert (report.result, report.sessions) == ("sound", 1)
    else:
        assert (report.result, "nothing was synced" in report.reason) == ("unreadable", True)


async def test_random_damage_never_alters_a_session_undetected(tmp_path: Path) -> None:
    await (await filled(tmp_path / "store", 150)).stop()
    program = [sys.executable, str(Path(__file__).with_name("flips.py"))]
    ran = await asyncio.to_thread(
        subprocess.run,
        [*program, str(tmp_path / "store"), str(tmp_path / "copy"), str(SEED), str(COUNT)],
        capture_output=True,
        text=True,
        check=True,
    )
    outcomes = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(outcomes) == COUNT
    assert [outcome for outcome in outcomes if outcome["result"] == "failed" or outcome.get("wrong")] == [], ran.stderr
    found = Counter(outcome["result"] for outcome in outcomes)
    assert found["unreadable"] >= COUNT // 5, "every file that was cut, at least"
