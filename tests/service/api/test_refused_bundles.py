"""A bundle that cannot be served affects no other bundle, and requests for it get the reason."""

import asyncio
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import wire
from damage import DAMAGES, MANIFEST, describe, vectors
from processes import Launched, StartProcess
from serving import Running, metric
from waiting import PATIENCE, until

from unroll.bundle import discover
from unroll.bundle.errors import printable
from unroll.service.models import loading
from unroll.service.settings import Settings


@pytest.fixture(scope="module")
def shelf(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shelf")
    shutil.copytree(repository / "gru" / "1", path / "gru" / "1")
    return path


@pytest.fixture(scope="module")
def running(shelf: Path) -> Iterator[Running]:
    running = Running(Settings(repository=shelf))
    yield running
    running.stop()


@pytest.fixture
def second(running: Running, shelf: Path, repository: Path) -> Iterator[Path]:
    """Version 2, intact and not yet loaded."""
    shutil.copytree(repository / "gru" / "2", shelf / "gru" / "2")
    yield shelf / "gru" / "2"
    for path in shelf.glob("gru/*"):
        if path.name != "1":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    running.rescan_now()


def versions(running: Running) -> list[str]:
    return [model.version for model in running.server.models if not model.retired]


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_bundle_affects_no_other_bundle(running: Running, second: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(second)
    running.rescan_now()
    assert reason in running.server.models.refused[("gru", "2")]
    assert versions(running) == ["1"]


@pytest.mark.parametrize("name", ["v1", "01", "latest\n"])
def test_folder_whose_name_is_no_version_is_refused(running: Running, second: Path, name: str) -> None:
    second.rename(second.with_name(name))
    running.rescan_now()
    [((_, version), why)] = running.server.models.refused.items()
    assert version == printable(name)
    assert why.startswith(f"bundle_name: version {name!r}: use up to 18 digits")
    assert versions(running) == ["1"]


def test_file_in_place_of_a_version_is_refused(running: Running, second: Path) -> None:
    shutil.rmtree(second)
    second.touch()
    running.rescan_now()
    assert running.server.models.refused[("gru", "2")].startswith(
        "bundle_file: manifest.json cannot be read: Not a dir"
    )
    assert versions(running) == ["1"]


@pytest.mark.parametrize("error", [TypeError("x"), MemoryError(), KeyError("x"), RecursionError(), AssertionError()])
@pytest.mark.parametrize("stage", ["open_backend", "measure"])
def test_any_error_while_a_bundle_is_loaded_refuses_it(
    running: Running, second: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loading, stage, fail)
        running.rescan_now()
    [why] = running.server.models.refused.values()
    assert why.startswith(f"bundle_unusable: {type(error).__name__}: {error}")
    assert versions(running) == ["1"]
    running.rescan_now()
    assert running.server.models.refused == {}
    assert versions(running) == ["1", "2"]


def test_served_bundle_is_the_one_read_before_its_files_changed(
    running: Running, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_backend = loading.open_backend

    def change(*arguments: object) -> object:
        (second / "model.onnx").write_bytes(b"changed")
        return open_backend(*arguments)

    digest = json.loads((second / MANIFEST).read_text())["files"]["model.onnx"]
    with monkeypatch.context() as patch:
        patch.setattr(loading, "open_backend", change)
        running.rescan_now()
    assert running.model("gru", "2").manifest.digest == digest
    running.rescan_now()
    assert "bundle_digest" in running.server.models.refused[("gru", "2")]
    assert versions(running) == ["1", "2"]


def test_unlistable_folder_unloads_nothing(running: Running, shelf: Path) -> None:
    away = (shelf / "gru").rename(shelf.with_name("away"))
    (shelf / "gru").symlink_to("nowhere")
    assert discover(shelf) == [shelf / "gru"]
    running.rescan_now()
    assert "No such file" in running.server.models.refused[("gru", "")]
    assert versions(running) == ["1"]
    (shelf / "gru").unlink()
    away.rename(shelf / "gru")
    running.rescan_now()
    assert running.server.models.refused == {}


async def test_request_for_a_refused_version_gets_the_reason(running: Running, second: Path) -> None:
    describe(second, parity=None)
    await asyncio.to_thread(running.rescan_now)
    async with httpx.AsyncClient(base_url=running.url) as http:
        for answer in (
            await http.get("/v1/models/gru:2"),
            await http.post("/v1/models/gru:2/sessions"),
            await http.post("/v1/models/gru:2/sequences", json={"inputs": [[[1.0, 2.0, 3.0]]]}),
            await http.get("/v2/models/gru/versions/2"),
            await http.get("/v2/models/gru/versions/2/ready"),
            await http.get("/v2/models/gru/versions/2/stats"),
            await http.post(
                "/v2/models/gru/versions/2/infer",
                **vars(wire.body({"x": np.ones((1, 2, 3), "<f4")})),
            ),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable"), answer.text
            assert "parity" in answer.text
        assert (await http.get("/v2/models/gru/ready")).status_code == 200
        assert (await http.get("/v1/models/gru:3")).json()["code"] == "model_unknown"
        text = (await http.get("/metrics")).text
        assert metric(text, "unroll_bundle_refused", model="gru", version="2") == 1


def test_a_start_with_a_broken_bundle_serves_the_others(start_process: StartProcess, shelf: Path) -> None:
    broken = shelf / "lstm" / "1"
    shutil.copytree(shelf / "gru" / "1", broken)
    try:
        process = start_process()
        [line] = [line for line in process.log if line["event"] == "bundle refused"]
        assert (line["model"], line["version"], line["level"]) == ("lstm", "1", "error")
        assert "the manifest belongs to gru/1" in line["reason"]
        with httpx.Client(base_url=process.url) as http:
            assert http.get("/readyz").status_code == 200
            assert http.post("/v1/models/gru/sequences", json={"inputs": [[[1.0, 2.0, 3.0]]]}).status_code == 200
            answer = http.get("/v2/models/lstm/ready")
            assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
            assert "the manifest belongs to gru/1" in answer.json()["error"]
            describe(broken, name="lstm")
            process.popen.send_signal(signal.SIGHUP)
            until(lambda: http.get("/v2/models/lstm/ready").status_code == 200, "the repaired bundle")
            assert http.post("/v1/models/lstm/sessions").status_code == 201
        describe(broken, name="other")
        refused = Launched("--repository", str(shelf), "--port", "0", "--device", "cpu", "--strict")
        _, log = refused.communicate(timeout=PATIENCE)
        assert refused.returncode == 1
        assert "the manifest belongs to other/1" in log
        assert "Traceback" not in log
    finally:
        shutil.rmtree(shelf / "lstm")


def test_a_start_with_nothing_but_broken_bundles_fails(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "gru" / "1", tmp_path / "gru" / "1")
    vectors("chunking.0", lambda a: np.array(9))(tmp_path / "gru" / "1")
    refused = Launched("--repository", str(tmp_path), "--port", "0", "--device", "cpu")
    _, log = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 1
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["event"] for line in lines][-2:] == ["bundle refused", "not started"]
    assert "chunking" in lines[-2]["reason"]
    assert (tmp_path / "gru" / "1" / MANIFEST).exists()
