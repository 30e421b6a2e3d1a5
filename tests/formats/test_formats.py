"""Files, messages and names of release 0.1 are read and reproduced byte for byte."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lmdb
import numpy as np
import pytest
from formats import exchanges, files, names, server
from formats.files import GOLDEN, KEPT, KEY, KEYS, ORIGIN, RECORD, SESSION, SESSIONS, SNAPSHOT, UNTOUCHED
from redis_server import RedisServer

from unroll import bundle
from unroll.bundle import Golden, Manifest
from unroll.service.state.sealed_snapshot import SnapshotKeys
from unroll.service.state.snapshot import Snapshot
from unroll.service.store import state_file
from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Commit
from unroll.service.store.record import Origin, Record, pack_last, pack_last_chunk, unpack_last
from unroll.service.store.redis_store import RedisStore, RedisStoreConfig


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def known(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


# ── files ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["steps", "mixed"])
def test_bundle(name: str, tmp_path: Path) -> None:
    folder = files.REPOSITORY / name / "1"
    read = bundle.read(folder)
    document = json.loads((folder / "manifest.json").read_bytes())
    assert read.manifest.digest == document["files"]["model.onnx"]
    assert [spec.name for spec in read.manifest.inputs] == [spec["name"] for spec in document["inputs"]]
    assert read.manifest.state_size == document["state_size"]
    assert read.golden.state.shape == read.golden.state_out.shape == (len(read.golden.state), read.manifest.state_size)
    assert all(array.shape[:2] == read.golden.inputs["x"].shape[:2] for array in read.golden.inputs.values())

    written = bundle.write(tmp_path, read.manifest, read.model, read.golden)
    for file in ("manifest.json", "model.onnx", "golden.safetensors"):
        assert (written / file).read_bytes() == (folder / file).read_bytes(), file


def test_bundle_of_the_first_release_without_the_later_fields() -> None:
    document = json.loads((files.REPOSITORY / "steps" / "1" / "manifest.json").read_bytes())
    del document["precision"], document["static"]
    manifest = Manifest.from_json(json.dumps(document).encode())
    assert (manifest.precision, manifest.static) == ("float32", ())


def test_golden_vectors() -> None:
    content = (files.REPOSITORY / "mixed" / "1" / "golden.safetensors").read_bytes()
    assert Golden.from_bytes(content).to_bytes() == content


def test_snapshot() -> None:
    assert SNAPSHOT.to_bytes() == golden("snapshot")
    check_snapshot(golden("snapshot"))


def check_snapshot(content: bytes) -> None:
    read = Snapshot.from_bytes(content, digest=SNAPSHOT.digest, state_size=4)
    assert (read.digest, read.position) == (SNAPSHOT.digest, SNAPSHOT.position)
    assert np.array_equal(read.row, SNAPSHOT.row)
    assert Snapshot.model_of(content) == SNAPSHOT.digest


def test_sealed_snapshot() -> None:
    keys, turned = SnapshotKeys(KEYS), SnapshotKeys(KEYS[::-1])
    assert keys.seal(SESSION, SNAPSHOT) == golden("sealed_snapshot")
    assert turned.seal(SESSION, SNAPSHOT) == golden("sealed_snapshot_second_key")
    for name in ("sealed_snapshot", "sealed_snapshot_second_key"):
        check_snapshot(keys.open(SESSION, golden(name)))


def test_origin_and_replies() -> None:
    assert ORIGIN.to_bytes() == golden("origin")
    assert Origin.from_bytes(golden("origin")) == ORIGIN
    assert pack_last(4, KEPT) == golden("last")
    assert unpack_last(golden("last")) == (KEPT, 4)
    one = KEPT[-1]
    assert pack_last_chunk(one.start, one.steps, one.digest, one.outputs) == pack_last(1, (one,))


def test_record() -> None:
    assert RECORD.to_bytes() == golden("record")
    assert Record.from_bytes(golden("record")) == files.SESSIONS[0][1]
    assert UNTOUCHED.to_bytes() == golden("record_untouched")
    assert Record.from_bytes(golden("record_untouched")) == UNTOUCHED


def test_state_file(tmp_path: Path) -> None:
    assert state_file.read(GOLDEN / "sessions.bin") == SESSIONS
    assert state_file.StateFile(tmp_path / "sessions").write(SESSIONS) == len(SESSIONS)
    assert (tmp_path / "sessions").read_bytes() == golden("sessions")


async def test_sessions_in_redis(redis_server: RedisServer) -> None:
    client, state, gone = redis_server.client, "unroll:{steps/pump-7}", "unroll:{steps/pump-7}:gone"
    store = RedisStore(RedisStoreConfig(redis_server.url, timeout=5.0))
    try:
        client.set(state, golden("redis_state"))
        assert await store.load(KEY) == RECORD
        client.delete(state)
        for name, expected in {"redis_gone_closed": files.CLOSED, "redis_gone_expired": files.EXPIRED}.items():
            client.set(gone, golden(name))
            assert await store.load(KEY) == expected
        client.delete(gone)

        commit = Commit(KEY, b"", RECORD.token, RECORD.packed(), begins=True)
        assert await store.commit([commit]) == [None]
        assert client.get(state) == golden("redis_state")
        assert client.get(gone) == golden("redis_gone_expired")
        end = Commit(KEY, RECORD.token, b"u" * 16, RECORD.packed(), ends=True)
        assert await store.commit([end]) == [None]
        assert client.get(state) is None
        assert client.get(gone) == golden("redis_gone_closed")
    finally:
        await store.stop()


async def test_sessions_in_a_folder_of_either_format(tmp_path: Path) -> None:
    EmbeddedStore(EmbeddedStoreConfig(tmp_path))._folder.close()
    host = json.loads((tmp_path / "host.json").read_text())
    (tmp_path / "host.json").write_text(json.dumps(host | {"format": 1}))
    with lmdb.open(str(tmp_path)) as environment, environment.begin(write=True) as transaction:
        for name in ("session", "session_1", "closed", "closed_1"):
            transaction.put(f"steps/{name}".encode(), golden(f"folder_{name}"))

    store = EmbeddedStore(EmbeddedStoreConfig(tmp_path, timeout=60.0, idle_timeout=None))
    for version in ("", "_1"):
        key = ("steps", f"session{version}")
        assert await store.load(key) == RECORD
        assert await store.load(("steps", f"closed{version}")) == files.CLOSED
        next_one = replace(RECORD, position=43, token=b"v" * 16)
        assert await store.commit([Commit(key, RECORD.token, next_one.token, next_one.packed())]) == [None]
        assert await store.load(key) == next_one
    await store.stop()
    assert json.loads((tmp_path / "host.json").read_text())["format"] == 2, "an earlier server refuses it"


def test_entries_of_a_folder(tmp_path: Path) -> None:
    files.write(tmp_path)
    for name in ("folder_session", "folder_closed"):
        assert (tmp_path / f"{name}.bin").read_bytes() == golden(name)


# ── messages ─────────────────────────────────────────────────────────────────────────────────────


def test_http_exchanges_and_metrics() -> None:
    running = server.start()
    try:
        with httpx.Client(base_url=running.url) as client:
            for exchange in known("http"):
                exchanges.check_answer(exchange["answer"], exchanges.ask(client, exchange["sent"]), exchange["sent"])
            found = {"routes": names.routes(client), "bodies": names.bodies(client), "metrics": names.metrics(client)}
    finally:
        running.stop()
    assert {name: known("names")[name] for name in found} == found


def test_streams() -> None:
    running = server.start()
    for model in ("mixed", "steps"):
        conversation = exchanges.Conversation(running, model)
        for exchange in known(f"stream_{model}"):
            sent = exchange["sent"]
            exchanges.check_messages(
                exchange["came"], conversation.exchange(sent), any_order=sent.get("any_order", False)
            )
        conversation.close()
    assert "stop" in sent, "the conversation must stop the server"


# ── names ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["flags", "settings", "codes", "bundle_codes", "store_metrics", "worker_metrics"])
def test_names(what: str) -> None:
    assert getattr(names, what)() == known("names")[what]
