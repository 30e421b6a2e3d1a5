"""A stack of recurrent layers with a linear head.

A plain PyTorch module, independent of export: export itself lifts the state out of `nn.GRU`, `nn.LSTM` and `nn.RNN`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict
from torch import nn

from unroll.models import checkpoint

#: The state of the stack: h, or for an LSTM (h, c), each (layers * directions, batch, hidden).
State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_CELLS: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedRNNConfig:
    """The configuration of a stack.

    The input is either `input_size` features per time step, or token ids below `vocabulary`, with an embedding of size
    `embedding_size`. `dropout` acts between layers, in training only.

    Raises:
        ValueError: for an invalid field or combination of fields, naming the field.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    cell: Literal["gru", "lstm", "rnn"]
    hidden_size: int
    layers: int
    output_size: int
    input_size: int | None = None
    vocabulary: int | None = None
    embedding_size: int | None = None
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    #: "step" for an output at every time step, "last" for one output per sequence.
    head: Literal["step", "last"] = "step"

    def __post_init__(self) -> None:
        if self.cell not in _CELLS:
            raise ValueError(f"cell is {self.cell!r}; choose one of {', '.join(_CELLS)}")
        if self.head not in ("step", "last"):
            raise ValueError(f"head is {self.head!r}; choose step or last")
        if (self.input_size is None) == (self.vocabulary is None):
            raise ValueError("give either input_size (features) or vocabulary (token ids)")
        if (self.vocabulary is None) != (self.embedding_size is None):
            raise ValueError("vocabulary and embedding_size come together")
        for name in ("hidden_size", "layers", "output_size", "input_size", "vocabulary", "embedding_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}, below 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, outside [0, 1)")
        if self.dropout and self.layers == 1:
            raise ValueError("dropout acts between layers and there is one layer")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class StackedRNN(nn.Module):
    """[embedding] → GRU, LSTM or tanh RNN of several layers → linear head.

    Takes x (batch, time, input_size) float32, or token ids (batch, time) int64. Returns (batch, time, output_size), or
    (batch, output_size) if `config.head` is "last".
    """

    def __init__(self, config: StackedRNNConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding: nn.Embedding | None = None
        inputs = config.input_size
        if config.vocabulary is not None and config.embedding_size is not None:
            self.embedding = nn.Embedding(config.vocabulary, config.embedding_size)
            inputs = config.embedding_size
        self.rnn = _CELLS[config.cell](
            inputs,
            config.hidden_size,
            config.layers,
            bias=config.bias,
            batch_first=True,
            dropout=config.dropout,
            bidirectional=config.bidirectional,
        )
        self.head = nn.Linear(config.directions * config.hidden_size, config.output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.advance(x)[0]

    def advance(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """Continue from `state`, or from zeros if None; returns the output and the final state."""
        if self.embedding is not None:
            x = self.embedding(x)
        sequence, state = self.rnn(x, state)
        if self.config.head == "step":
            return self.head(sequence), state
        h = state if isinstance(state, torch.Tensor) else state[0]
        # The final h of the last layer in both directions. In sequence[:, -1] the reverse direction has seen only one
        # step; here both have seen the whole sequence.
        last = h[-self.config.directions :].transpose(0, 1).flatten(1)
        return self.head(last), state

    def save(self, stem: Path) -> None:
        """Write `stem`.safetensors and `stem`.json."""
        checkpoint.write(stem, self, self.config)

    @classmethod
    def load(cls, stem: Path) -> Self:
        """Load a model that `save` wrote.

        Raises:
            CheckpointError: if a field or a tensor is missing, unknown, or of another shape.
        """
        model = cls(checkpoint.read_config(stem, StackedRNNConfig))
        checkpoint.read_weights(stem, model)
        return model
