"""Reduced precision is measured at export, stated in the bundle, and enforced by the server."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from served_models.models import BUNDLES
from torch import Tensor, nn

from unroll import bundle, cli
from unroll.bundle import GoldenMismatch
from unroll.bundle.graph import operators
from unroll.export import ExportError, Report, export
from unroll.export.onnx.precision import reduced_graph
from unroll.export.verification.reduced import limit
from unroll.service.engine.backend import EngineOptions, open_backend
from unroll.service.engine.runner import Runner


class Model(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, hidden: int = 48, head: bool = True) -> None:
        super().__init__()
        self.rnn = kind(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 4) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def exported(repository: Path, module: nn.Module, **options: object) -> Report:
    return export(module, {"x": torch.randn(2, 9, 8)}, name="m", repository=repository, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Report]:
    """`reports(kind, precision)` exports the same model in each precision."""

    @cache
    def one(kind: str, precision: str) -> Report:
        torch.manual_seed(0)
        return exported(tmp_path_factory.mktemp(kind), Model(getattr(nn, kind)), precision=precision)

    return one


def counted(report: Report) -> dict[str, int]:
    return operators((report.path / "model.onnx").read_bytes())


def test_float32_export_is_unchanged(reports) -> None:
    manifest = reports("LSTM", "float32").manifest
    assert manifest.precision == "float32"
    assert manifest.bit_exact
    assert "LSTM" in counted(reports("LSTM", "float32"))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(("LSTM", precision) for precision in ("float16", "int8")),
        *(pytest.param("GRU", precision, marks=pytest.mark.long) for precision in ("float16", "int8")),
    ],
)
def test_bundle_states_its_error_and_is_served(reports, kind: str, precision: str) -> None:
    report = reports(kind, precision)
    manifest = report.manifest
    assert manifest.precision == precision
    assert precision in str(report)
    by_output = {entry.output: entry for entry in manifest.parity}
    for entry in reports(kind, "float32").manifest.parity:
        reduced = by_output[entry.output]
        assert reduced.tolerance >= entry.tolerance
        assert reduced.onnxruntime <= reduced.tolerance < 0.05
    assert by_output["y"].onnxruntime > 1e-5
    # The server accepts the bundle within exactly that bound. The state stays float32.
    found = bundle.read(report.path)
    backend = open_backend(found, "cpu", EngineOptions())
    assert backend.slack == 1.0
    bundle.Verifier(backend.runner, manifest).replay(found.golden)
    _, proof = backend.create_engine(64, 16)
    assert proof.parity["y"] <= by_output["y"].tolerance
    time = next(iter(found.golden.inputs.values())).shape[1]
    _, state = backend.runner(found.golden.inputs, found.golden.state, np.full(len(found.golden.state), time, np.int32))
    assert state.dtype == np.float32
    assert cli.main(["verify", str(report.path)]) == 0


def test_server_enforces_the_bound_of_the_bundle(reports) -> None:
    """A model whose error exceeds its own bound is refused, even if another precision would allow that error."""
    coarse, fine = (bundle.read(reports("LSTM", precision).path) for precision in ("int8", "float16"))
    with pytest.raises(GoldenMismatch):
        bundle.Verifier(Runner(coarse.model, coarse.manifest), fine.manifest).replay(fine.golden)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lstm", {"com.microsoft.DynamicQuantizeLSTM": 2, "MatMulInteger": 1}),
        ("gru", {"GRU": 2, "MatMulInteger": 1}),
    ],
)
def test_int8_quantises_weights_of_these_operators(name: str, expected: dict[str, int]) -> None:
    found = operators(reduced_graph(_graph(name), "int8"))
    names = {"LSTM", "GRU", "MatMul", "com.microsoft.DynamicQuantizeLSTM", "MatMulInteger"}
    assert {operator: count for operator, count in found.items() if operator in names} == expected


def test_model_without_weights_to_quantise_is_refused() -> None:
    with pytest.raises(ExportError, match="has neither") as refusal:
        reduced_graph(_graph("matrices-as-steps"), "int8")
    assert refusal.value.code == "precision"


def _graph(name: str) -> onnx.ModelProto:
    """Return the graph of a float32 bundle."""
    return onnx.ModelProto.FromString(bundle.read(BUNDLES / name / "1").model)


@pytest.mark.long
def test_too_large_an_error_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'y' in int8 differs") as refusal:
        exported(tmp_path, Model(), precision="int8", max_error=1e-10)
    assert refusal.value.code == "max_error"
    assert list(tmp_path.iterdir()) == []


def test_allowed_error_is_the_bound(reports) -> None:
    manifest = reports("LSTM", "int8").manifest
    free, state = manifest.parity
    allowed = (free.onnxruntime + free.tolerance) / 2
    assert limit(manifest, allowed).parity == (replace(free, tolerance=allowed), state)
    assert limit(manifest, 1.0) == limit(manifest, None) == manifest
    with pytest.raises(ExportError, match="'y' in int8 differs") as refusal:
        limit(manifest, 1e-10)
    assert refusal.value.code == "max_error"


class ByHand(nn.Module):
    """Creates a float32 tensor, which PyTorch cannot concatenate with float16."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0] @ torch.eye(6, dtype=torch.float32)


def test_model_that_pytorch_cannot_run_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="PyTorch cannot run it in float16") as refusal:
        exported(tmp_path, ByHand(), precision="float16")
    assert refusal.value.code == "precision"
    assert list(tmp_path.iterdir()) == []


def test_gpu_refuses_int8_and_a_second_reduction(reports) -> None:
    with pytest.raises(ValueError, match="is for the CPU"):
        open_backend(bundle.read(reports("LSTM", "int8").path), "cuda:0", EngineOptions())
    with pytest.raises(ValueError, match="in float16 already"):
        open_backend(bundle.read(reports("LSTM", "float16").path), "cuda:0", EngineOptions(precision="tf32"))
