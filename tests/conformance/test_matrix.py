"""The committed document has every row. A few rows are measured again; `make conformance` measures all."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from conformance import documents, matrix, plain_export
from conformance.architectures import ARCHITECTURES, measure
from conformance.kinds import kinds
from conformance.kinds.kind import gru, made
from conformance.matrix import Exported, Row
from unroll.examples.architectures import denoiser, forecaster, keywords
from unroll.examples.architectures.spectrum import Spectrum

PAGE = documents.PAGE.read_text()


def rows(title: str) -> dict[str, list[str]]:
    """Return the rows of the table below a heading, by first cell."""
    [table] = re.findall(rf"^### {re.escape(title)}\n\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


OUTCOMES = {name: cells[0] for name, cells in rows("Comparison with `torch.onnx.export`").items()}


def test_every_kind_is_in_the_document() -> None:
    names = [kind.name for kind in kinds()]
    assert len(names) == len(set(names)) >= 60
    assert list(OUTCOMES) == names
    exported = rows("Results of export")
    assert {name for name, outcome in OUTCOMES.items() if outcome in {"streams", "whole only"}} == exported.keys()
    assert set(OUTCOMES.values()) == {"streams", "whole only", "refused"}


def test_document_has_all_other_measurements() -> None:
    for architecture in ARCHITECTURES:
        assert f"| {architecture.name} | {architecture.like} |" in PAGE
    assert PAGE.count("| int8 |") == PAGE.count("| float16 |") >= 6
    assert re.search(r"^\d+ random models$", PAGE, re.MULTILINE)
    assert re.search(r"^ +0 silently wrong$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(
    "name",
    [
        "learned initial state",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("bidirectional GRU", "two speeds")),
    ],
)
def test_measured_row_equals_the_document(name: str) -> None:
    found = matrix.measure_export(name)
    assert found.outcome == OUTCOMES[name]
    if found.outcome == "streams":
        cells = rows("Results of export")[name]
        assert cells[-1] == found.nodes
        assert cells[-2] == "yes"
        assert found.bits
        assert found.error is not None
        assert found.error < 1e-5


def loop(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = x.new_zeros(x.shape[0], 6)
    outs = []
    for t in range(x.shape[1]):
        h = s.cell(x[:, t], h)
        outs.append(h)
    return torch.stack(outs, 1)


def judged(module: nn.Module, *, dynamo: bool = False, **example: torch.Tensor) -> plain_export.Verdict:
    return plain_export.judge(lambda: module, example or {"x": torch.randn(2, 7, 4)}, True, dynamo)


def test_plain_export_of_a_layer_works_and_hands_out_its_state() -> None:
    module = made(lambda s, x, h: s.rnn(x, h), rnn=gru())
    verdict = judged(module, x=torch.randn(2, 7, 4), h=torch.zeros(1, 2, 6))
    assert (verdict.outcome, verdict.state) == ("works", True)
    assert not judged(made(lambda s, x: s.rnn(x)[0], rnn=gru())).state


def test_plain_export_of_a_loop_is_silently_wrong() -> None:
    verdict = judged(made(loop, cell=nn.GRUCell(4, 6)))
    assert verdict.outcome == "silently wrong"
    assert "another length" in verdict.says


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru()
        self.h = torch.zeros(1, 2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, h = self.rnn(x, self.h[:, :1].expand(-1, x.shape[0], -1).contiguous())
        self.h = h
        return y


def test_plain_export_loses_a_state_that_the_module_keeps() -> None:
    verdict = judged(Kept())
    assert verdict.outcome == "silently wrong"
    assert "second chunk" in verdict.says


@pytest.mark.long
def test_plain_export_that_fails_says_where() -> None:
    verdict = judged(made(lambda s, x: s.rnn(x.cummax(1).values)[0], rnn=gru()), dynamo=True)
    assert verdict.outcome == "fails"
    assert "cummax" in verdict.says


def test_only_the_marked_block_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- kinds: begin -->\nold\n<!-- kinds: end -->\nafter\n")
    row = Row(
        "a | b",
        Exported("streams", "", 1e-7, True, "1 GRU"),
        plain_export.Verdict("works"),
        plain_export.Verdict("works"),
    )
    documents.replace("kinds", documents.kinds([row], "make conformance"), page)
    text = page.read_text()
    assert text.startswith("before\n<!-- kinds: begin -->\n")
    assert text.endswith("<!-- kinds: end -->\nafter\n")
    assert "old" not in text
    assert "| a \\| b | yes | yes | 1.0e-07 | yes | 1 GRU |" in text
    with pytest.raises(ValueError, match="no place for random"):
        documents.replace("random", [], page)


@pytest.mark.long
def test_an_architecture_streams() -> None:
    found = measure(next(each for each in ARCHITECTURES if each.name == "forecaster"))
    assert found.streams
    assert found.error < 1e-5
    assert found.stages["tracing it into ONNX"] > 0


@pytest.mark.parametrize("module", [denoiser, keywords, forecaster])
def test_architectures_give_a_step_for_a_step(module) -> None:
    example = module.example()
    with torch.no_grad():
        returned = module.build()(**example)
    outputs = returned.values() if isinstance(returned, dict) else [returned]
    size = next(iter(example.values())).shape[:2]
    assert all(output.shape[:2] == size and torch.isfinite(output).all() for output in outputs)


def test_spectrum_equals_the_fourier_transform() -> None:
    spectrum, frames = Spectrum(16), torch.randn(5, 16)
    real, imaginary = spectrum.split(frames)
    assert torch.allclose(torch.complex(real, imaginary), torch.fft.rfft(frames), atol=1e-5)
    assert torch.allclose(spectrum.join(real, imaginary), frames, atol=1e-5)
