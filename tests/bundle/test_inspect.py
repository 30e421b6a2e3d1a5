"""`unroll inspect` prints the contents of a bundle and reports damage."""

import json
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from unroll import cli
from unroll.bundle import BundleError
from unroll.bundle.graph import operators

BUNDLE = Path(__file__).parents[2] / "examples" / "repository" / "bytes" / "1"


def inspect(*arguments: object) -> int:
    return cli.main(["inspect", *map(str, arguments)])


def test_table_shows_the_contents_of_the_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(BUNDLE) == 0
    printed = capsys.readouterr().out
    for words in ("bytes version 1", "streaming  yes", "2 LSTM", "0 <= value < 256", "(time, 256)", "1792 bytes"):
        assert words in printed
    assert printed.count("forward    h") == 2


def test_a_declared_rate_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(BUNDLE.parents[1] / "sound" / "1") == 0
    assert "samples: 16000 values per second" in capsys.readouterr().out


def test_json_contains_the_manifest_and_the_contents_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(BUNDLE, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    assert {name: found[name] for name in manifest} == manifest
    assert found["bytes"] == {
        "model.onnx": (BUNDLE / "model.onnx").stat().st_size,
        "golden.safetensors": (BUNDLE / "golden.safetensors").stat().st_size,
        "state": 4 * manifest["state_size"],
    }
    nodes = onnx.load(BUNDLE / "model.onnx").graph.node
    assert found["operators"] == dict(Counter(node.op_type for node in nodes))


def test_operators_include_subgraphs_and_other_domains() -> None:
    inner = helper.make_graph([helper.make_node("Tanh", ["a"], ["b"])], "then", [], [_value("b")])
    nodes = [
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
        helper.make_node("Gelu", ["d"], ["e"], domain="com.microsoft"),
        helper.make_node("Tanh", ["e"], ["f"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [_value("c")], [_value("f")]))
    assert operators(model.SerializeToString()) == {"Tanh": 3, "If": 1, "com.microsoft.Gelu": 1}


@pytest.mark.parametrize("content", [b"\x3a\xff\xff\xff\xff\x0fgraph", b"\x3b", b"\x3a" + b"\x80" * 12, b"\x3a\x80"])
def test_unreadable_model_is_reported(content: bytes) -> None:
    with pytest.raises(BundleError, match="not an ONNX model"):
        operators(content)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])


@pytest.mark.parametrize(
    ("file", "status", "says"), [("model.onnx", 1, "SHA-256 differs"), ("manifest.json", 2, "is not a bundle")]
)
def test_a_damaged_bundle_is_refused(tmp_path: Path, capsys, file: str, status: int, says: str) -> None:
    copy = tmp_path / "bytes" / "1"
    shutil.copytree(BUNDLE, copy)
    (copy / file).write_bytes(b"{}") if file == "model.onnx" else (copy / file).unlink()
    assert inspect(copy) == status
    assert says in capsys.readouterr().err
