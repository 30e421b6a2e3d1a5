"""How export decides: guards parsed from PyTorch's messages, samples like the example, chunkings, reports."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unroll.export import ExportError, export
from unroll.export.onnx.tracing import _suspects
from unroll.export.signature.samples import Samples, states

GUARD = (
    "Constraints violated (time)!\n  - Not all values of {0} in the specified range satisfy the generated guard {1}."
)


def test_sizes_that_break_a_guard_are_suspects() -> None:
    length, rows = "L['inputs'][0].size()[1]", "L['state'].size()[0]"
    assert _suspects(GUARD.format(f"time = {length}", f"((-1) + {length}) != 1")) == [(3, 2)]
    assert _suspects(GUARD.format(f"batch = {rows}", f"3 <= {rows}")) == [(1, 7), (2, 7)]


@pytest.mark.parametrize("guard", ["2 <= {0} and {0} <= 20", "{0} != 50", "Mod({0}, 2) == 0", "{0} % 2 == 1", ""])
def test_any_other_guard_is_refused(guard: str) -> None:
    length = "L['inputs'][0].size()[1]"
    with pytest.raises(ExportError, match="every length and batch size alike") as refusal:
        _suspects(GUARD.format(f"time = {length}", guard.format(length)))
    assert refusal.value.code == "not_exportable"


def test_samples_look_like_the_example() -> None:
    rng = np.random.default_rng(0)
    x = (rng.uniform(1, 2, (3, 5, 2)) * np.array([1e-3, -1e3])).astype(np.float32)
    samples = Samples({"x": x, "token": rng.integers(0, 2, (3, 5)), "flag": x[..., 0] > 0}, {"token": 1000})
    drawn = samples.draw(4, 50, seed=1)
    assert {name: array.dtype for name, array in drawn.items()} == {
        name: array.dtype for name, array in samples.example.items()
    }
    assert drawn["x"].shape == (4, 50, 2)
    assert (drawn["x"][..., 0] > 0).all()
    assert (np.abs(drawn["x"][..., 0]) < 4e-3).all()
    assert (drawn["x"][..., 1] < 0).all()
    assert drawn["token"].min() >= 0
    assert 500 < drawn["token"].max() < 1000
    assert all(
        np.array_equal(array, again)
        for array, again in zip(drawn.values(), samples.draw(4, 50, 1).values(), strict=True)
    )


def test_samples_for_an_example_of_zeros_vary() -> None:
    drawn = Samples({"x": np.zeros((1, 1, 3), np.float32)}).draw(9, 9, seed=0)["x"]
    assert 0.5 < drawn.std() < 2


def test_states_start_with_the_initial_state() -> None:
    rows = states(3, np.array([0.5, 0.0], np.float32), seed=0)
    assert rows.dtype == np.float32
    assert rows[0].tolist() == [0.5, 0.0]
    assert (rows[1:] != 0).all()


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: torch.Tensor, h0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rnn(x, h0.transpose(0, 1).contiguous())


def test_report_describes_the_state(tmp_path: Path) -> None:
    example = {"x": torch.randn(2, 5, 4), "h0": torch.linspace(-1, 1, 6).expand(2, 1, 6)}
    stages: list[str] = []
    report = export(Translator(), example, name="t", repository=tmp_path, progress=stages.append)
    assert [spec.name for spec in report.manifest.inputs] == ["x"]
    assert report.manifest.initial_state == tuple(torch.linspace(-1, 1, 6).tolist())
    assert any("output 'y1' is the final state" in note for note in report.notes)
    assert any("input 'h0' is the initial state" in note for note in report.notes)
    assert all(note in str(report) for note in report.notes)
    assert len(stages) == 6
    graph = (report.path / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in graph
    assert b"stack_trace" not in graph
    assert {"torch", "onnx", "onnxruntime", "unroll", "opset"} <= report.manifest.tools.keys()


@pytest.mark.long
def test_wide_outputs_make_a_short_golden(tmp_path: Path) -> None:
    module = nn.GRU(2, 600, batch_first=True)
    report = export(module, {"input": torch.randn(2, 5, 2)}, name="wide", repository=tmp_path)
    assert (report.path / "golden.safetensors").stat().st_size < 2 * 64 * 1024


class FarBack(nn.Module):
    """A recurrent layer with outputs that also depend on the input `lag` steps earlier."""

    def __init__(self, lag: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.lag = lag

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]).expand(-1, self.lag, -1), x], 1)[:, : x.shape[1]]
        return self.head(self.rnn(x)[0]) + before


@pytest.mark.parametrize("lag", [pytest.param(24, marks=pytest.mark.long), 400])
def test_long_lookback_does_not_stream(tmp_path: Path, lag: int) -> None:
    report = export(FarBack(lag), {"x": torch.randn(2, 12, 3)}, name="far", repository=tmp_path)
    assert not report.manifest.streamable
    assert "reaches far back in time" in str(report.manifest.not_streamable_because)


class ScaledByTheLoudest(nn.Module):
    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.lstm, self.axes = nn.LSTM(3, 3, batch_first=True), axes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x / x.abs().amax(self.axes, keepdim=True).clamp(min=20))[0]
        return y


def test_what_only_extreme_inputs_show_does_not_stream(tmp_path: Path) -> None:
    manifest = export(ScaledByTheLoudest((1, 2)), {"x": torch.randn(2, 7, 3)}, name="m", repository=tmp_path).manifest
    assert not manifest.streamable


def test_rows_that_only_extreme_inputs_mix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as refusal:
        export(ScaledByTheLoudest((0, 2)), {"x": torch.randn(2, 7, 3)}, name="m", repository=tmp_path)
    assert refusal.value.code == "rows_mixed"


class Silenced(nn.Module):
    """Falls silent if any value is large."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.lstm, self.axes = nn.LSTM(3, 3, batch_first=True), axes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0] * (x.abs().amax(self.axes, keepdim=True) < 1000)
        return y


def test_a_threshold_on_the_whole_sequence_does_not_stream(tmp_path: Path) -> None:
    assert not export(Silenced((1, 2)), {"x": torch.randn(2, 7, 3)}, name="m", repository=tmp_path).manifest.streamable


def test_a_threshold_on_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as refusal:
        export(Silenced((0, 2)), {"x": torch.randn(2, 7, 3)}, name="m", repository=tmp_path)
    assert refusal.value.code == "rows_mixed"


class Binned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.bins = nn.LSTM(3, 3, batch_first=True), nn.Embedding(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(self.bins((x[..., 0].abs() * 4).long()))[0]
        return y


def test_forward_may_refuse_extreme_inputs(tmp_path: Path) -> None:
    assert export(Binned(), {"x": torch.randn(2, 7, 3)}, name="m", repository=tmp_path).manifest.streamable
