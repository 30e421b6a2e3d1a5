"""Output shapes, heads, state carried across calls, and strict validation of checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unroll.models.checkpoint import CheckpointError
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

SMALL: dict[str, Any] = {"cell": "gru", "input_size": 3, "hidden_size": 4, "layers": 2, "output_size": 5}
TOKENS: dict[str, Any] = SMALL | {"input_size": None, "vocabulary": 7, "embedding_size": 6}

SIZE = st.integers(1, 5)


@st.composite
def configs(draw: st.DrawFn) -> StackedRNNConfig:
    layers = draw(st.integers(1, 3))
    tokens = draw(st.booleans())
    return StackedRNNConfig(
        cell=draw(st.sampled_from(["gru", "lstm", "rnn"])),
        hidden_size=draw(SIZE),
        layers=layers,
        output_size=draw(SIZE),
        input_size=None if tokens else draw(SIZE),
        vocabulary=draw(SIZE) if tokens else None,
        embedding_size=draw(SIZE) if tokens else None,
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])) if layers > 1 else 0.0,
        bidirectional=draw(st.booleans()),
        head=draw(st.sampled_from(["step", "last"])),
    )


def example(config: StackedRNNConfig, batch: int, time: int) -> torch.Tensor:
    if config.vocabulary is not None:
        return torch.randint(0, config.vocabulary, (batch, time))
    assert config.input_size is not None
    return torch.randn(batch, time, config.input_size)


@given(configs(), SIZE, SIZE)
@settings(deadline=None, max_examples=30)
def test_output_has_the_shape_of_the_head(config: StackedRNNConfig, batch: int, time: int) -> None:
    y = StackedRNN(config)(example(config, batch, time))
    assert y.shape == ((batch, time, config.output_size) if config.head == "step" else (batch, config.output_size))


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_last_is_step_at_the_end(cell: str) -> None:
    step, last = (StackedRNN(StackedRNNConfig(**SMALL | {"cell": cell, "head": head})) for head in ("step", "last"))
    last.load_state_dict(step.state_dict())
    x = example(step.config, 2, 6)
    torch.testing.assert_close(last(x), step(x)[:, -1])


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_last_in_both_directions_has_read_the_whole_sequence_twice(cell: str) -> None:
    model = StackedRNN(StackedRNNConfig(**SMALL | {"cell": cell, "bidirectional": True, "head": "last"}))
    x = example(model.config, 2, 6)
    sequence, _ = model.rnn(x)
    ends = torch.cat([sequence[:, -1, :4], sequence[:, 0, 4:]], dim=1)
    torch.testing.assert_close(model(x), model.head(ends))


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("fields", [SMALL, TOKENS], ids=["features", "tokens"])
def test_two_halves_with_the_state_carried_are_the_whole(cell: str, fields: dict[str, Any]) -> None:
    model = StackedRNN(StackedRNNConfig(**fields | {"cell": cell}))
    x = example(model.config, 2, 6)
    first, state = model.advance(x[:, :2])
    second, _ = model.advance(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), model(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cell": "qrnn"}, "cell is 'qrnn'; choose one of gru, lstm, rnn"),
        ({"head": "mean"}, "head is 'mean'; choose step or last"),
        ({"input_size": None}, "give either input_size .* or vocabulary"),
        ({"vocabulary": 7, "embedding_size": 6}, "give either input_size .* or vocabulary"),
        ({"embedding_size": 6}, "vocabulary and embedding_size come together"),
        ({"input_size": None, "vocabulary": 7}, "vocabulary and embedding_size come together"),
        ({"input_size": 0}, "input_size is 0, below 1"),
        ({"hidden_size": -1}, "hidden_size is -1, below 1"),
        ({"layers": 0}, "layers is 0, below 1"),
        ({"output_size": 0}, "output_size is 0, below 1"),
        ({"dropout": 1.0}, r"dropout is 1.0, outside \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout is nan, outside \[0, 1\)"),
        ({"dropout": 0.5, "layers": 1}, "dropout acts between layers and there is one layer"),
    ],
)
def test_invalid_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackedRNNConfig(**SMALL | fields)


@given(configs())
@settings(deadline=None, max_examples=20)
def test_saved_and_loaded_is_the_same_model(tmp_path_factory: pytest.TempPathFactory, config: StackedRNNConfig) -> None:
    stem = tmp_path_factory.mktemp("checkpoint") / "v1.5"
    model = StackedRNN(config).eval()
    model.save(stem)
    loaded = StackedRNN.load(stem).eval()
    assert loaded.config == config
    x = example(config, 2, 3)
    assert torch.equal(loaded(x), model(x))


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    """The path of a saved model, without suffix."""
    stem = tmp_path / "model"
    StackedRNN(StackedRNNConfig(**SMALL)).save(stem)
    return stem


def rewrite(stem: Path, change: dict[str, Any], without: str = "") -> None:
    """Change fields of the saved configuration and leave one out."""
    fields = asdict(StackedRNNConfig(**SMALL)) | change
    fields.pop(without, None)
    stem.with_suffix(".json").write_text(json.dumps(fields))


@pytest.mark.parametrize("field", list(asdict(StackedRNNConfig(**SMALL))))
def test_configuration_with_a_missing_field_is_refused(stem: Path, field: str) -> None:
    rewrite(stem, {}, without=field)
    with pytest.raises(CheckpointError, match=field):
        StackedRNN.load(stem)


@pytest.mark.parametrize(
    "change",
    [{"gates": 3}, {"hidden_size": "4"}, {"hidden_size": 4.5}, {"bias": 1}, {"cell": "qrnn"}, {"layers": 0}],
    ids=str,
)
def test_a_configuration_with_a_wrong_field_is_refused(stem: Path, change: dict[str, Any]) -> None:
    rewrite(stem, change)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        StackedRNN.load(stem)


def test_configuration_that_is_not_json_is_refused(stem: Path) -> None:
    stem.with_suffix(".json").write_text("{")
    with pytest.raises(CheckpointError, match="json"):
        StackedRNN.load(stem)


def test_weights_of_another_shape_are_refused(stem: Path) -> None:
    rewrite(stem, {"hidden_size": 8})
    with pytest.raises(CheckpointError, match=r"rnn\.weight_ih_l0"):
        StackedRNN.load(stem)


def test_a_missing_and_an_unknown_tensor_are_refused(stem: Path) -> None:
    path = stem.with_suffix(".safetensors")
    tensors = load_file(path)
    save_file(tensors | {"rnn.weight_ih_l2": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"rnn\.weight_ih_l2"):
        StackedRNN.load(stem)
    del tensors["head.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        StackedRNN.load(stem)


def test_damaged_or_absent_files_are_refused(stem: Path) -> None:
    path = stem.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        StackedRNN.load(stem)
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        StackedRNN.load(stem.with_name("absent"))
