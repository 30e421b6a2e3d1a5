"""`unroll verify`: all checks of a valid bundle pass; a wrong manifest gives exit status 1."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unroll import bundle as bundles
from unroll import cli
from unroll.bundle import Bundle
from unroll.service.engine.backend import EngineOptions
from unroll.service.verify import Check, verify

CHECKS = {
    "golden vectors = PyTorch float64",
    "random chunks = whole",
    "in a batch = alone",
    "padded = alone",
    "golden vectors, stepped by the engine",
}


def checks(found: Bundle) -> list[Check]:
    return list(verify(found, "cpu", EngineOptions()))


def copied(repository: Path, name: str, to: Path, **changes: object) -> Bundle:
    """Write the bundle with a changed manifest, as export would."""
    found = bundles.read(repository / name / "1")
    manifest = replace(found.manifest, **changes)
    return bundles.read(bundles.write(to, manifest, found.model, found.golden))


@pytest.mark.parametrize("name", ["lstm", "gru", "last", "tokens", "two"])
def test_valid_bundle_passes(repository: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = repository / name / "1"
    manifest = bundles.read(path).manifest
    assert cli.main(["verify", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    said = CHECKS if manifest.ragged else CHECKS - {"padded = alone"}
    for what in said:
        assert printed.count(what) == len(manifest.outputs) + 1


def test_a_model_for_whole_sequences_is_not_stepped(repository: Path) -> None:
    found = {check.what for check in checks(bundles.read(repository / "whole" / "1"))}
    assert found == CHECKS - {"random chunks = whole", "golden vectors, stepped by the engine"}


def test_false_claim_of_streaming_fails(repository: Path, tmp_path: Path, capsys) -> None:
    lies = copied(repository, "whole", tmp_path, streamable=True, not_streamable_because=None)
    assert {c.what for c in checks(lies) if not c.holds} >= {"random chunks = whole"}
    assert cli.main(["verify", str(lies.path)]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_false_claim_of_ragged_rows_fails(repository: Path, tmp_path: Path) -> None:
    lies = copied(repository, "last", tmp_path, ragged=True)
    assert {c.what for c in checks(lies) if not c.holds} == {"padded = alone"}


def test_other_weights_than_pytorchs(repository: Path, tmp_path: Path) -> None:
    one, other = (bundles.read(repository / "gru" / version) for version in "12")
    path = bundles.write(tmp_path, one.manifest, other.model, one.golden)
    broken = {c.what.partition(":")[0] for c in checks(bundles.read(path)) if not c.holds}
    assert broken == {"golden vectors = PyTorch float64", "stepped by the engine"}


def test_unusable_verify_arguments_are_refused(repository: Path, capsys) -> None:
    for arguments, says in (
        ([str(repository / "gru" / "1"), "--device", "tpu"], "use cpu, auto"),
        ([str(repository / "gru" / "1"), "--precision", "tf32"], "needs a GPU"),
    ):
        assert cli.main(["verify", *arguments]) == 1
        assert says in capsys.readouterr().err


def test_needs_neither_torch_nor_onnx(repository: Path) -> None:
    program = (
        "import sys, json; from unroll import cli; status = cli.main(sys.argv[1:]);"
        "print(json.dumps([status, [m for m in ('torch', 'onnx', 'unroll.export') if m in sys.modules]]))"
    )
    for command in ("verify", "inspect"):
        arguments = [sys.executable, "-c", program, command, str(repository / "lstm" / "1")]
        ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert json.loads(ran.stdout.splitlines()[-1]) == [0, []]
