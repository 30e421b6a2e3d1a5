"""What `manifest.json` says of a model: its tensors, its state row, and what export proved.

Read strictly: an unknown field, a wrong type or an inconsistent layout is an error, never a default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, Self, get_args

import numpy as np
from pydantic import ConfigDict, TypeAdapter

FORMAT = 1

#: Names the bundle's graph uses for itself; a model's own tensors must not carry them.
RESERVED_NAMES = frozenset({"state", "state_out", "sequence_lens"})

Dtype = Literal["float32", "int64", "int32", "bool"]

#: What the graph computes in. Inputs, outputs and state are float32 with each.
Precision = Literal["float32", "float16", "int8"]

#: To be disabled in onnxruntime: ends the process at a recurrent layer with float16 weights on the CPU.
CRASHING_OPTIMIZERS = ["FuseFp16InitializerToFp32NodeTransformer"]

#: What a piece of state is: a recurrent layer's h or c, what a loop over time or forward itself hands on, what another
#: layer needs of the past, or how many time steps there were. A static input's values stay what they are.
Kind = Literal["h", "c", "carry", "past", "count", "static"]

_LITTLE_ENDIAN = {name: np.dtype(name).newbyteorder("<") for name in get_args(Dtype)}

#: float32 has every integer up to here.
_EXACT = 2**24

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of the model.

    The tensor is `(batch, time, *shape)` if `time`, else `(batch, *shape)` (a last-step output).
    `limit` bounds an integer input to `0 <= value < limit` (the rows of the embedding it indexes).
    """

    __pydantic_config__ = _STRICT

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    time: bool
    limit: int | None = None

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """Little-endian NumPy dtype, the byte order of every wire format."""
        return _LITTLE_ENDIAN[self.dtype]

    @property
    def size(self) -> int:
        """Values in one time step."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one time step."""
        return self.size * self.numpy.itemsize


@dataclass(frozen=True, slots=True)
class StaticInput:
    """An input without time: given once, when a sequence begins, and kept in the state row from `offset` on.

    One client's is `shape`; in the row it is flat and float32, so an integer must be below 2**24 either side of 0.
    `limit` is as in TensorSpec.
    """

    __pydantic_config__ = _STRICT

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    limit: int | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class StateSlot:
    """One piece of the state row: `row[offset : offset + size]`.

    It belongs to one layer and direction of the module at path `module`, in its `call`-th call within one
    forward pass.
    """

    __pydantic_config__ = _STRICT

    module: str
    call: int
    layer: int
    direction: Literal["forward", "reverse"]
    kind: Kind
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest absolute differences of one output from PyTorch in float64, over the golden inputs.

    `torch_float32` is taken over 32 more sequences as well. `tolerance` is what any provider must stay
    within: 4 times PyTorch float32's own error plus a floor of 1e-7 times the output's scale. Of a model in
    reduced precision `onnxruntime` is the largest of more sequences, too, and `tolerance` twice as much (in
    float16 at least 4 times PyTorch float16's own error), or less if export was told so.
    """

    __pydantic_config__ = _STRICT

    output: str
    onnxruntime: float
    torch_float32: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """A bundle's `manifest.json`."""

    __pydantic_config__ = _STRICT

    format: Literal[1]
    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSlot, ...]
    state_size: int
    #: The state row a sequence starts from, with zeros where static inputs go; None is all zeros.
    initial_state: tuple[float, ...] | None
    #: True if running step by step, carrying the state, equals running the whole sequence.
    streamable: bool
    #: Why not, in words for the model's author; None if streamable.
    not_streamable_because: str | None
    #: True if rows of different length may share a padded batch through `sequence_lens`.
    ragged: bool
    #: True if chunking, batch size and neighbours do not change a single bit on the CPU.
    bit_exact: bool
    parity: tuple[Parity, ...]
    #: SHA-256 of the bundle's other files, in hex, by file name.
    files: dict[str, str]
    #: Versions of the tools that wrote the bundle, by name.
    tools: dict[str, str]
    #: Manifests that do not say are older than the reduced ones.
    precision: Precision = "float32"
    #: Inputs that are given once; a sequence cannot start without any of them.
    static: tuple[StaticInput, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of `model.onnx`: what a session or snapshot is bound to."""
        return self.files["model.onnx"]

    def blank_row(self) -> np.ndarray:
        """State row a sequence starts from but for its static inputs, which are zeros: (state_size,) float32."""
        if self.initial_state is None:
            return np.zeros(self.state_size, np.float32)
        return np.array(self.initial_state, np.float32)

    def initial_row(self, static: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """State row a sequence starts from: (state_size,) float32. static: each of the static inputs, of its shape.

        Raises ValueError if one is missing, unknown, of another shape, or out of range.
        """
        row, given = self.blank_row(), static or {}
        names = sorted(spec.name for spec in self.static)
        if names != sorted(given):
            raise ValueError(f"a sequence begins with the static inputs {names}, not with {sorted(given)}")
        for spec in self.static:
            value = np.asarray(given[spec.name])
            if value.shape != spec.shape:
                raise ValueError(f"static input {spec.name!r} is {value.shape}, not {spec.shape}")
            if spec.dtype.startswith("int"):
                low, high = (0, spec.limit) if spec.limit is not None else (-_EXACT, _EXACT)
                if (value < low).any() or (value >= high).any():
                    raise ValueError(f"static input {spec.name!r} must be at least {low} and below {high}")
            row[spec.offset : spec.offset + spec.size] = value.ravel()
        return row

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self, indent=2) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises ValueError (pydantic's, or with the inconsistency found)."""
        manifest = _ADAPTER.validate_json(text)
        manifest._check()
        return manifest  # type: ignore[return-value]

    def _check(self) -> None:
        names = [tensor.name for tensor in self.inputs + self.outputs] + [spec.name for spec in self.static]
        if not self.inputs or not self.outputs:
            raise ValueError("a model needs at least one input and one output")
        if len(set(names)) != len(names) or RESERVED_NAMES & set(names):
            raise ValueError(f"tensor names repeat or are reserved: {names}")
        if any(size < 1 for tensor in self.inputs + self.outputs for size in tensor.shape):
            raise ValueError("a tensor's feature shape holds a size below 1")
        if not all(tensor.time for tensor in self.inputs):
            raise ValueError("an input has no time axis")
        offset = 0
        for slot in self.state:
            if slot.offset != offset or slot.size < 1:
                raise ValueError(f"the state row has a gap or an overlap at offset {offset}")
            offset += slot.size
        if offset != self.state_size or not self.state:
            raise ValueError(f"state_size is {self.state_size}, the slots hold {offset}")
        static = [(slot.offset, slot.size) for slot in self.state if slot.kind == "static"]
        if static != [(spec.offset, spec.size) for spec in self.static]:
            raise ValueError("the static inputs are not where the state row has room for them")
        if self.initial_state is not None and len(self.initial_state) != self.state_size:
            raise ValueError("initial_state does not have state_size values")
        if {entry.output for entry in self.parity} != {tensor.name for tensor in self.outputs} | {"state_out"}:
            raise ValueError("parity must cover every output and state_out")
        if self.streamable != (self.not_streamable_because is None):
            raise ValueError("streamable and not_streamable_because contradict each other")


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
