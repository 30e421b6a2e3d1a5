"""Random models, chunkings and batches: results are bit-identical to the whole sequence and near float64."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unroll.bundle import Manifest
from unroll.export import export
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

CONFIGS = [
    StackedRNNConfig(cell="gru", hidden_size=32, layers=3, output_size=4, input_size=7),
    StackedRNNConfig(cell="lstm", hidden_size=33, layers=4, output_size=2, input_size=1, bias=False),
    StackedRNNConfig(cell="lstm", hidden_size=16, layers=1, output_size=13, vocabulary=13, embedding_size=6),
    StackedRNNConfig(cell="rnn", hidden_size=12, layers=2, output_size=3, input_size=5),
]


@dataclass(frozen=True)
class Exported:
    module: StackedRNN
    manifest: Manifest
    session: onnxruntime.InferenceSession

    def run(self, x: np.ndarray, state: np.ndarray, lens: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        lens = np.full(len(x), x.shape[1], np.int32) if lens is None else lens
        y, after = self.session.run(["y", "state_out"], {"x": x, "state": state, "sequence_lens": lens})
        return y, after

    def draw(self, rng: np.random.Generator, batch: int, time: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.module.config
        if config.vocabulary is not None:
            x = rng.integers(0, config.vocabulary, (batch, time))
        else:
            x = rng.standard_normal((batch, time, config.input_size), np.float32)
        return x, rng.uniform(-0.9, 0.9, (batch, self.manifest.state_size)).astype(np.float32)

    def torch(self, x: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return PyTorch's float64 results, computed with its own state tensors (layers, batch, hidden)."""
        config = self.module.config
        kinds = 2 if config.cell == "lstm" else 1
        pieces = torch.from_numpy(state).double().reshape(len(x), config.layers, kinds, config.hidden_size)
        h, *c = (piece.contiguous() for piece in pieces.permute(2, 1, 0, 3))
        double = StackedRNN(config).double()
        double.load_state_dict(self.module.state_dict())
        inputs = torch.from_numpy(x)
        with torch.no_grad():
            y, after = double.advance(inputs.double() if x.dtype.kind == "f" else inputs, (h, c[0]) if c else h)
        after = torch.stack(after if c else (after,)).permute(2, 1, 0, 3).reshape(len(x), -1)
        return y.numpy(), after.numpy()


@pytest.fixture(scope="session")
def exported(repository: Path):
    @cache
    def one(index: int) -> Exported:
        torch.manual_seed(index)
        module = StackedRNN(CONFIGS[index])
        tokens = torch.randint(0, 13, (2, 9))
        example = tokens if module.config.vocabulary else torch.randn(2, 9, module.config.input_size)
        report = export(module, {"x": example}, name=f"stack{index}", repository=repository)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(report.path / "model.onnx", options, providers=["CPUExecutionProvider"])
        return Exported(module, report.manifest, session)

    return one


models = pytest.mark.parametrize("index", [0, 2, *(pytest.param(index, marks=pytest.mark.long) for index in (1, 3))])
examples = settings(max_examples=25, deadline=None, derandomize=True)


@models
def test_stack_streams_and_is_exact(index, exported) -> None:
    manifest = exported(index).manifest
    assert manifest.streamable
    assert manifest.ragged
    assert manifest.bit_exact
    assert manifest.initial_state is None


@models
@examples
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_streamed_equals_whole_and_batched_equals_single(index, exported, seed: int, lengths: list[int]) -> None:
    """One sequence is cut into chunks, and each chunk runs in a different batch at a different row."""
    model, rng = exported(index), np.random.default_rng(seed)
    x, state = model.draw(rng, 1, sum(lengths))
    whole, after = model.run(x, state)

    pieces, start = [], 0
    for length in lengths:
        company, others = model.draw(rng, int(rng.integers(1, 20)), length)
        place = int(rng.integers(len(company)))
        company[place], others[place] = x[0, start : start + length], state[0]
        y, reached = model.run(company, others)
        pieces.append(y[place])
        state = reached[place : place + 1]
        start += length

    assert np.array_equal(np.concatenate(pieces), whole[0])
    assert np.array_equal(state, after)


@models
@examples
@given(seed=st.integers(0, 2**32), lens=st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_padded_row_equals_single_row(index, exported, seed: int, lens: list[int]) -> None:
    model, rng = exported(index), np.random.default_rng(seed)
    x, state = model.draw(rng, len(lens), 12)
    y, after = model.run(x, state, np.array(lens, np.int32))
    for row, length in enumerate(lens):
        alone, reached = model.run(x[row : row + 1, :length], state[row : row + 1])
        assert np.array_equal(y[row, :length], alone[0])
        assert np.array_equal(after[row], reached[0])


@models
@examples
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 9), time=st.integers(1, 40))
def test_results_are_near_float64(index, exported, seed: int, batch: int, time: int) -> None:
    model, rng = exported(index), np.random.default_rng(seed)
    x, state = model.draw(rng, batch, time)
    tolerance = {entry.output: entry.tolerance for entry in model.manifest.parity}
    for name, ours, theirs in zip(("y", "state_out"), model.run(x, state), model.torch(x, state), strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= tolerance[name]
        assert tolerance[name] < 1e-5
