"""Small random models as data; their `repr` is Python source that recreates them.

Every block maps (batch, time, inputs) to (batch, time, outputs). Most blocks are common ones; some mix time steps or
rows, or confuse batch and time. `strategies.py` draws the trees, `modules.py` builds them.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer.

    Attributes:
        axes: `wrong` is a time-first layer that receives the batch first.
        start: the initial state that it receives.
    """

    kind: Literal["LSTM", "GRU", "RNN", "RNN relu"]
    inputs: int
    hidden: int
    layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    projection: int = 0
    axes: Literal["batch first", "time first", "wrong"] = "batch first"
    start: Literal["none", "zeros", "learned", "first step"] = "none"

    @property
    def outputs(self) -> int:
        return (self.projection or self.hidden) * (2 if self.bidirectional else 1)


LateKind = Literal[
    "none",
    "reset",
    "copy",
    "zero",
    "scale",
    "table",
    "phase",
    "length",
    "window",
    "stop",
    "growing",
    "argument",
    "slice",
    "zip",
    "islice",
    "missing",
]
Iterates = Literal["range", "enumerate", "while", "steps", "reversed", "filled"]
Memory = Literal[
    "none",
    "count",
    "row of a table",
    "mean",
    "average",
    "ring",
    "window",
    "hysteresis",
    "debounce",
    "peak",
    "dict",
    "attribute",
    "masked",
    "reset",
]
Holds = Literal["parameter", "dict", "object", "closure", "list"]
Cell = Literal["LSTMCell", "GRUCell", "RNNCell", "GRU", "minimal", "peephole", "layer norm"]


@dataclass(frozen=True)
class Loop:
    """A cell, or a layer, in a Python loop over time; no library has the cells `minimal` and `peephole`.

    `late` is how behaviour changes from step `when` on, every `when` steps, or beyond a length of `when`.

    Attributes:
        memory: what a step remembers in addition to the cell's state.
        holds: where a tensor of weights is kept.
    """

    cell: Cell
    inputs: int
    hidden: int
    iterates: Iterates = "range"
    late: LateKind = "none"
    when: int = 24
    memory: Memory = "none"
    holds: Holds = "parameter"

    @property
    def outputs(self) -> int:
        return self.hidden


@dataclass(frozen=True)
class Conv:
    """A convolution: `causal` padding looks only back, `centred` looks both ways, `none` shortens the sequence."""

    inputs: int
    outputs: int
    kernel: int
    dilation: int = 1
    depthwise: bool = False
    padding: Literal["causal", "centred", "none"] = "causal"


@dataclass(frozen=True)
class Frames:
    """A strided convolution over the features of all time steps, one after the other; `overlap` reaches back."""

    inputs: int
    outputs: int
    overlap: bool = True


@dataclass(frozen=True)
class Counter:
    """Doubles its input after `when` calls; `kept` is where the count is stored."""

    kept: Literal["attribute", "dict", "list", "object", "array", "generator", "class", "global", "iterator"]
    inputs: int
    when: int = 20

    @property
    def outputs(self) -> int:
        return self.inputs


@dataclass(frozen=True)
class Dense:
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Elementwise:
    kind: Literal["relu", "gelu", "tanh", "silu", "elu", "softplus", "gate", "dropout", "clamp"]
    inputs: int

    @property
    def outputs(self) -> int:
        return self.inputs


@dataclass(frozen=True)
class Norm:
    """A normalisation; `instance` and `time mean` span the whole sequence, `rows` spans the batch."""

    kind: Literal["layer", "batch", "rms", "instance", "time mean", "rows"]
    inputs: int

    @property
    def outputs(self) -> int:
        return self.inputs


AlongKind = Literal[
    "cumulative sum",
    "cumulative mean",
    "cumulative maximum",
    "difference",
    "lag",
    "flip",
    "look ahead",
    "position",
    "length",
    "attention",
    "causal attention",
    "softmax",
    "every second",
    "last two",
    "last forty",
    "twice if long",
    "windows of forty",
    "twice after forty",
]


@dataclass(frozen=True)
class Along:
    """A function without weights that reads other time steps."""

    kind: AlongKind
    inputs: int

    @property
    def outputs(self) -> int:
        return self.inputs


@dataclass(frozen=True)
class Residual:
    body: tuple["Block", ...]
    inputs: int

    @property
    def outputs(self) -> int:
        return self.inputs


@dataclass(frozen=True)
class Both:
    """Two parallel branches with concatenated features."""

    left: "Block"
    right: "Block"

    @property
    def inputs(self) -> int:
        return self.left.inputs

    @property
    def outputs(self) -> int:
        return self.left.outputs + self.right.outputs


@dataclass(frozen=True)
class Twice:
    """One module, called on its own output."""

    body: "Block"

    @property
    def inputs(self) -> int:
        return self.body.inputs

    @property
    def outputs(self) -> int:
        return self.body.outputs


Block: TypeAlias = (
    Recurrent | Loop | Counter | Conv | Frames | Dense | Elementwise | Norm | Along | Residual | Both | Twice
)


End = Literal[
    "steps",
    "last",
    "mean",
    "maximum",
    "steps and last",
    "dict",
    "time first",
    "state",
    "kept",
    "step",
    "step kept",
]


@dataclass(frozen=True)
class Tree:
    """A model.

    Attributes:
        source: its inputs: floats, a token id, or both; floats with a `goal` that has no time, or with NaN for missing.
        mask: an argument whose default is None: left out, given as None, or given as booleans, one for each step.
        end: its result; `state` also returns the last recurrent layer's state, `kept` stores it in the module. With
            `step`, forward computes one time step: it takes and returns that state, reset by the mask, or keeps those
            of all layers.
        layout: where forward has the batch and the time.
    """

    source: Literal["floats", "tokens", "both", "goal", "missing"]
    width: int
    blocks: tuple[Block, ...]
    end: End
    layout: Literal["batch first", "time first", "time last"] = "batch first"
    mask: Literal["left out", "None", "booleans"] = "left out"
    seed: int = 0
