"""The parts of a model's single time step: its recurrent layers, and the segments of the graph between them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np


class NotSeparable(Exception):
    """The graph cannot be split into parts; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A recurrent layer, with weights in ONNX's order: gates i, o, f, c of an LSTM and z, r, h of a GRU.

    Attributes:
        x: Name of the input tensor, (1, batch, inputs).
        y: Name of the output tensor, (1, 1, batch, hidden).
        w: Input weights, (gates * hidden, inputs).
        r: Recurrent weights, (gates * hidden, hidden).
        b: Biases, (2 * gates * hidden,).
        h, c: Offsets of the state in the state row; c is 0 for a GRU.
        bounded: x is the h of another layer, and so within [-1, 1].
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
    """A part of the graph.

    Attributes:
        inputs: For each input, the tensor of the whole graph that holds its values, maybe in another shape.
        shapes: Shapes of inputs and outputs for one time step; -1 is the batch.
    """

    model: bytes
    inputs: dict[str, str]
    outputs: list[str]
    shapes: dict[str, tuple[int, ...]]
