"""A bundle round-trips exactly or is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unroll import bundle
from unroll.bundle import BundleError, Golden, GoldenMismatch, Manifest, Parity, StateSlot, TensorSpec
from unroll.bundle.files import check_name

MANIFEST = Manifest(
    format=1,
    name="sum",
    version="2",
    inputs=(TensorSpec("x", "float32", (3,), True), TensorSpec("token", "int64", (), True, limit=5)),
    outputs=(TensorSpec("y", "float32", (3,), True), TensorSpec("last", "int32", (), False)),
    state=(StateSlot("rnn", 0, 0, "forward", "h", 0, 2), StateSlot("rnn", 0, 0, "forward", "c", 2, 1)),
    state_size=3,
    initial_state=(0.1, 0.0, -1e-30),
    streamable=True,
    not_streamable_because=None,
    ragged=True,
    bit_exact=True,
    parity=tuple(Parity(name, 0.0, 1e-7, 1e-6) for name in ("y", "last", "state_out")),
    files={},
    tools={"torch": "2"},
)


def run(inputs, state, sequence_lens):
    """A running sum as the model: the state is the sum so far."""
    total = state[:, None] + np.cumsum(inputs["x"], axis=1, dtype=state.dtype)
    return {"y": total, "last": inputs["token"][:, -1].astype(np.int32)}, total[:, -1].copy()


@pytest.fixture
def golden() -> Golden:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 6, 3), np.float32), "token": rng.integers(0, 5, (2, 6))}
    state = rng.standard_normal((2, 3), np.float32)
    outputs, after = run(
        {"x": inputs["x"].astype(np.float64), "token": inputs["token"]}, state.astype(np.float64), None
    )
    return Golden(inputs, state, outputs, after, ((6,), (1, 1, 1, 1, 1, 1), (2, 3, 1)))


@pytest.fixture
def path(tmp_path: Path, golden: Golden) -> Path:
    return bundle.write(tmp_path, MANIFEST, b"graph", golden)


def test_round_trip(path: Path, golden: Golden) -> None:
    read = bundle.read(path)
    assert read.path == path
    assert read.model_path.read_bytes() == b"graph"
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
    (tmp_path / "elsewhere").write_bytes(b"graph")
    (path / "model.onnx").unlink()
    (path / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="SHA-256 differs"):
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
        {"inputs": []},
        {"parity": []},
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
        bundle.write(tmp_path / "r", replace(MANIFEST, state_size=7), b"graph", golden)
    assert not (tmp_path / "r").exists()


def test_existing_bundle_is_kept_unless_asked(path: Path, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(BundleError, match="exists"):
        bundle.write(tmp_path, MANIFEST, b"other", golden)
    assert bundle.read(path).model_path.read_bytes() == b"graph"
    bundle.write(tmp_path, MANIFEST, b"other", golden, replace_existing=True)
    assert bundle.read(path).model_path.read_bytes() == b"other"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "é", "x" * 65, "-a", "a\n"])
def test_bad_name(name: str) -> None:
    with pytest.raises(BundleError, match="model name"):
        check_name(name, "1")


@pytest.mark.parametrize("version", ["", "0", "01", "-1", "1.0", "v1", "1" * 10, "1\n", "١"])
def test_bad_version(version: str) -> None:
    with pytest.raises(BundleError, match="version"):
        check_name("a", version)


def test_discover_sorts_versions_as_numbers(tmp_path: Path) -> None:
    for folder in ("b/1", "a/10", "a/9", "a/latest", "a/.writing-x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text("{}")
    (tmp_path / "a/11").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in bundle.discover(tmp_path)]
    assert found == ["a/9", "a/10", "b/1"]


def test_replay_runs_every_chunking(golden: Golden) -> None:
    lengths = []

    def counted(inputs, state, sequence_lens):
        lengths.append(inputs["x"].shape[1])
        return run(inputs, state, sequence_lens)

    worst = bundle.Verifier(counted, MANIFEST).replay(golden)
    assert lengths == [6, 1, 1, 1, 1, 1, 1, 2, 3, 1]
    assert worst.keys() == {"y", "last", "state_out"}
    assert max(worst.values()) < 1e-6

    lengths.clear()
    bundle.Verifier(counted, replace(MANIFEST, streamable=False, not_streamable_because="because")).replay(golden)
    assert lengths == [6]


@pytest.mark.parametrize("wrong", [1e-3, np.nan, np.inf])
def test_replay_refuses_other_answers(golden: Golden, wrong: float) -> None:
    def off(inputs, state, sequence_lens):
        outputs, after = run(inputs, state, sequence_lens)
        after[0, 0] += wrong
        return outputs, after

    with pytest.raises(GoldenMismatch, match="state_out"):
        bundle.Verifier(off, MANIFEST).replay(golden)


def test_replay_refuses_a_state_that_is_not_carried(golden: Golden) -> None:
    with pytest.raises(GoldenMismatch, match=r"in chunks \(1, 1"):
        bundle.Verifier(lambda x, state, lens: run(x, golden.state, lens), MANIFEST).replay(golden)


def test_chunked_joins_time_and_keeps_the_last(golden: Golden) -> None:
    whole = bundle.Verifier(run, MANIFEST).chunked(golden.inputs, golden.state, (6,))
    cut = bundle.Verifier(run, MANIFEST).chunked(golden.inputs, golden.state, (2, 3, 1))
    assert cut["y"].shape == (2, 6, 3)
    assert np.array_equal(cut["last"], golden.inputs["token"][:, -1])
    assert np.allclose(cut["y"], whole["y"], atol=1e-6)


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"not a file"])
def test_damaged_vectors(damage: bytes) -> None:
    with pytest.raises(ValueError, match="golden vectors"):
        Golden.from_bytes(damage)
