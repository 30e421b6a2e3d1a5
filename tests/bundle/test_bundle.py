"""A bundle is read and written back exactly, or refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from sum_model import MANIFEST

from unroll import bundle
from unroll.bundle import BundleError, Golden, Manifest
from unroll.bundle.manifest import check_name

#: Models without nodes, from two versions of ONNX.
GRAPH, OTHER = b"\x08\x0a\x3a\x00", b"\x08\x09\x3a\x00"
#: A tolerance so large that any output would match PyTorch's.
UNUSABLE = (float("inf"), float("nan"), -1.0)


@pytest.fixture
def path(tmp_path: Path, golden: Golden) -> Path:
    return bundle.write(tmp_path, MANIFEST, GRAPH, golden)


def test_round_trip(path: Path, golden: Golden) -> None:
    read = bundle.read(path)
    assert read.path == path
    assert read.model == GRAPH
    assert replace(read.manifest, files={}) == MANIFEST
    assert read.manifest.initial_row().tobytes() == np.array([0.1, 0.0, -1e-30], np.float32).tobytes()
    assert read.golden.chunkings == golden.chunkings
    assert read.golden.to_bytes() == golden.to_bytes()
    assert {p.name for p in path.iterdir()} == {"model.onnx", "manifest.json", "golden.safetensors"}
    assert {p.name for p in path.parent.iterdir()} == {"2"}


def test_no_initial_state_is_zeros(path: Path) -> None:
    row = replace(MANIFEST, initial_state=None).initial_row()
    assert (row.dtype, row.tolist()) == (np.float32, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
def test_damaged_file_is_refused(path: Path, name: str) -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is not the file"):
        bundle.read(path)


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors", "manifest.json"])
def test_missing_file_is_refused(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(BundleError):
        bundle.read(path)


def test_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(GRAPH)
    (path / "model.onnx").unlink()
    (path / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"model\.onnx is not a file"):
        bundle.read(path)


def test_moved_bundle_is_refused(path: Path) -> None:
    moved = path.rename(path.with_name("3"))
    with pytest.raises(BundleError, match="the manifest belongs to sum/2"):
        bundle.read(moved)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"format": 2},
        {"state_size": 4},
        {"state_size": "3"},
        {"streamable": False},
        {"initial_state": [1.0]},
        {"rates": {"z": 8000.0}},
        {"rates": {"x": 0.0}},
        {"inputs": []},
        {"parity": []},
        *({"parity": [{**asdict(each), "tolerance": value} for each in MANIFEST.parity]} for value in UNUSABLE),
        {"outputs": [{"name": "state", "dtype": "float32", "shape": [3], "time": True, "limit": None}]},
        {"inputs": [{"name": "x", "dtype": "float64", "shape": [3], "time": True, "limit": None}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [0], "time": True, "limit": None}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [3], "time": False, "limit": None}]},
    ],
    ids=str,
)
def test_inconsistent_manifest_is_refused(path: Path, change: dict) -> None:
    document = json.loads((path / "manifest.json").read_text()) | change
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError):
        bundle.read(path)


def test_overlapping_slots_are_refused(path: Path) -> None:
    document = json.loads((path / "manifest.json").read_text())
    document["state"][1]["offset"] = 1
    with pytest.raises(ValueError, match="gap or an overlap"):
        Manifest.from_json(json.dumps(document).encode())


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(BundleError, match="state_size"):
        bundle.write(tmp_path / "r", replace(MANIFEST, state_size=7), GRAPH, golden)
    assert not (tmp_path / "r").exists()


def test_existing_bundle_is_kept_unless_asked(path: Path, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        bundle.write(tmp_path, MANIFEST, OTHER, golden)
    assert bundle.read(path).model == GRAPH
    bundle.write(tmp_path, MANIFEST, OTHER, golden, replace_existing=True)
    assert bundle.read(path).model == OTHER


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "é", "x" * 65, "-a", "a\n"])
def test_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(BundleError, match="model name"):
        check_name(name, "1")


@pytest.mark.parametrize("version", ["", "0", "01", "-1", "1.0", "v1", "1" * 19, "1\n", "١"])
def test_invalid_version_is_refused(version: str) -> None:
    with pytest.raises(BundleError, match="version"):
        check_name("a", version)


def test_discover_sorts_versions_as_numbers(tmp_path: Path) -> None:
    for folder in ("b/1", "a/10", "a/9", "a/v1", "a/01", "a/.writing-x", ".git/v1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text("{}")
    for folder in ("a/11", "a/logs", "lost+found"):
        (tmp_path / folder).mkdir()
    for file in ("a/8", "a/notes", "README"):
        (tmp_path / file).touch()
    found = [str(path.relative_to(tmp_path)) for path in bundle.discover(tmp_path)]
    assert found == ["a/8", "a/9", "a/10", "a/01", "a/v1", "b/1"]


def test_unlistable_folder_is_not_a_bundle(tmp_path: Path) -> None:
    for name in ("lost+found", "model"):
        (tmp_path / name).symlink_to("nowhere")
    assert bundle.discover(tmp_path) == [tmp_path / "model"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"not a file"])
def test_damaged_golden_vectors_are_refused(damage: bytes) -> None:
    with pytest.raises(ValueError, match="golden vectors"):
        Golden.from_bytes(damage)
