"""Inputs that allow NaN: verified with NaN, and refused if NaN would reach an answer or persist in the state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from served_models.models import Gaps
from torch import Tensor, nn

from unroll import bundle, cli
from unroll.export import ExportError, export


class Filled(nn.Module):
    """Replaces missing values by zero and feeds a mask to the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(7, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        is_missing = torch.isnan(x)
        return self.head(self.rnn(torch.cat([x.nan_to_num(), is_missing.float(), known], -1))[0])


class Spread(Gaps):
    """Lets NaN reach the output, because NaN * 0 is NaN."""

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        return super().forward(x, known) + 0 * x[..., :2]


class Before(nn.Module):
    """Stores its input, possibly NaN, in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, before, answers = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 3), []
        for step in x.unbind(1):
            h = self.cell(torch.cat([before.nan_to_num(), step.nan_to_num()], 1), h)
            before = step / 2
            answers.append(h)
        return torch.stack(answers, 1)


X, KNOWN = torch.randn(2, 9, 3), torch.randn(2, 9, 1)


@pytest.mark.parametrize(
    ("kind", "source"),
    [(Filled, "test_allow_nan:Filled"), pytest.param(Gaps, "served_models.models:Gaps", marks=pytest.mark.long)],
)
def test_command_exports_a_model_that_allows_nan(
    kind: type[nn.Module], source: str, few_steps: None, tmp_path: Path
) -> None:
    model = kind().eval()
    torch.save(model.state_dict(), tmp_path / "gaps.pt")
    words = ["--weights", str(tmp_path / "gaps.pt"), "--repository", str(tmp_path), "--name", "gaps"]
    described = ["--input", "x:float32:3", "--input", "known:float32:1", "--allow-nan", "x"]
    assert cli.main(["export", source, *words, *described]) == 0
    found = bundle.read(tmp_path / "gaps" / "1")
    assert {spec.name: spec.nan for spec in found.manifest.inputs} == {"x": True, "known": False}
    assert np.isnan(found.golden.inputs["x"]).any()  # servers replay it when they load the bundle
    assert found.manifest.streamable
    x, known = torch.randn(60, 3), torch.randn(60, 1)
    x[torch.rand(60, 3) < 0.5] = torch.nan
    answers, _ = Oracle(tmp_path, "gaps").all(x.numpy(), known.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(answers[0], model(x[None], known[None])[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "example", "allowed", "code", "says"),
    [
        (Spread, {"x": X, "known": KNOWN}, "x", "not_finite", "torch.where"),
        pytest.param(Before, {"x": X}, "x", "not_finite", "the state is NaN", marks=pytest.mark.long),
        (Gaps, {"x": X, "known": KNOWN}, "y", "input", "'y', which is not an input"),
        (Gaps, {"x": X, "known": KNOWN.long()}, "known", "input", "int64"),
        (Gaps, {"x": X.clone().fill_(torch.inf), "known": KNOWN}, "x", "not_finite", "infinity"),
    ],
)
def test_invalid_use_of_nan_is_refused(
    model: type, example: dict[str, Any], allowed: str, code: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=says) as refusal:
        export(model(), example, name="refused", repository=tmp_path, allow_nan=[allowed])
    assert refusal.value.code == code


def test_nan_that_is_not_allowed_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--allow-nan x") as refusal:
        export(Gaps(), {"x": X * torch.nan, "known": KNOWN}, name="refused", repository=tmp_path)
    assert refusal.value.code == "not_finite"
