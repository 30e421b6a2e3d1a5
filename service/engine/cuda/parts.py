"""A model's single time step in parts: its recurrent layers, and what of the graph is to be run around them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np


class NotSeparable(Exception):
    """The graph cannot be taken apart; says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """x, y: names of the tensors it takes, (1, batch, inputs), and gives, (1, 1, batch, hidden).

    w (gates * hidden, inputs), r (gates * hidden, hidden), b (2 * gates * hidden,): as ONNX has them, the gates of an
    LSTM being i, o, f, c and those of a GRU z, r, h. h, c: where its state lies in the row; c is 0 for a GRU.
    bounded: is x the h of another layer, and so within [-1, 1]?
    """

    cell: Literal["LSTM", "GRU"]
    x: str
    y: str
    w: np.ndarray
    r: np.ndarray
    b: np.ndarray
    h: int
    c: int
    bounded: bool

    @property
    def hidden(self) -> int:
        return int(self.r.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.w.shape[1])


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the graph. inputs: its own names, each with that of the tensor whose values it has, in another shape.

    shapes: of its inputs and outputs, for one time step; the batch is -1.
    """

    model: bytes
    inputs: dict[str, str]
    outputs: list[str]
    shapes: dict[str, tuple[int, ...]]
