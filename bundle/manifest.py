"""The manifest of a bundle: the model's tensors, its state row, and the parity that export measured.

Parsing is strict: an unknown field, a wrong type or an inconsistent layout is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, prod
from typing import Any, Literal, Self, get_args

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from unroll.bundle.errors import BundleError

FORMAT = 1

#: Names of the graph's own tensors; a model's tensors must have other names.
RESERVED_NAMES = frozenset({"state", "state_out", "sequence_lens"})

Dtype = Literal["float32", "int64", "int32", "bool"]

#: The precision of the graph's computation. Inputs, outputs and state are always float32.
Precision = Literal["float32", "float16", "int8"]

#: Disabled in onnxruntime: crashes on a recurrent layer with float16 weights on the CPU.
CRASHING_OPTIMIZERS = ["FuseFp16InitializerToFp32NodeTransformer"]

#: The kinds of state: a recurrent layer's h or c, where any value is valid; values carried by a loop over time or by
#: forward itself; earlier steps that another layer needs; the number of steps; a static input's values, which never
#: change.
Kind = Literal["h", "c", "carry", "past", "count", "static"]

_LITTLE_ENDIAN = {name: np.dtype(name).newbyteorder("<") for name in get_args(Dtype)}

#: float32 represents every integer up to here exactly.
_EXACT = 2**24

# Limits of parsing, far above what export writes: a state row of 8,000 values is large.
_MOST_TENSORS, _MOST_SLOTS, _MOST_STATE = 1024, 65_536, 2**20
_MOST_DIMENSIONS, _MOST_VALUES, _MOST_LIMIT = 16, 2**24, 2**53
_LONGEST_NAME, _LONGEST_TEXT = 256, 4096

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
#: As in Triton: a 63-bit number, which may be a time such as 20261129120000.
_MODEL_VERSION = re.compile(r"[1-9][0-9]{0,17}")

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of the model.

    Attributes:
        time: The tensor is (batch, time, *shape); otherwise it is (batch, *shape), an output of the last step.
        limit: Bounds an integer input to `0 <= value < limit`, the size of the table that it indexes.
        nan: A float32 input may contain NaN, which means a missing value.
    """

    __pydantic_config__ = _STRICT

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    time: bool
    limit: int | None = None
    nan: bool = False

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The NumPy dtype, little-endian as in every wire format."""
        return _LITTLE_ENDIAN[self.dtype]

    @property
    def size(self) -> int:
        """Values of one time step."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one time step."""
        return self.size * self.numpy.itemsize


@dataclass(frozen=True, slots=True)
class StaticInput:
    """An input without time: given once, when a sequence starts, and kept in the state row.

    Attributes:
        shape: Shape of one client's value. The row stores it flat, as float32, so an integer's absolute value must be
            below 2**24.
        offset: Index of the first value in the state row.
        limit: As in TensorSpec.
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
    """One slice of the state row, `row[offset : offset + size]`.

    Attributes:
        module: Path of the module that owns it.
        call: Index of the module's call within one forward pass.
        layer, direction: Layer and direction within the module.
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
    """Largest absolute differences of one output from PyTorch in float64.

    Attributes:
        output: The output, or `state_out`.
        onnxruntime: onnxruntime's difference over the golden inputs; in reduced precision over more sequences as well.
        torch_float32: PyTorch float32's difference over the golden inputs and 32 more sequences.
        tolerance: Maximum difference on any device: 4 times `torch_float32` plus 1e-7 of the output's scale. In
            reduced precision it is twice `onnxruntime`, in float16 at least 4 times PyTorch float16's difference, and
            at most the limit given to export.
    """

    __pydantic_config__ = _STRICT

    output: str
    onnxruntime: float
    torch_float32: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    __pydantic_config__ = _STRICT

    format: int
    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSlot, ...]
    state_size: int
    #: The state row that a sequence starts from, with zeros in place of static inputs; None: all zeros.
    initial_state: tuple[float, ...] | None
    #: True if running step by step with a carried state equals running the whole sequence.
    streamable: bool
    #: Why not, for the model's author; None if streamable.
    not_streamable_because: str | None
    #: True if rows of different lengths may share a padded batch through `sequence_lens`.
    ragged: bool
    #: True if chunking, batch size and other rows of a batch do not change any bit of the results on the CPU.
    bit_exact: bool
    parity: tuple[Parity, ...]
    #: SHA-256 of the bundle's other files, in hex, by file name.
    files: dict[str, str]
    #: Versions of the tools that wrote the bundle, by name.
    tools: dict[str, str]
    #: Missing in manifests that predate reduced precisions.
    precision: Precision = "float32"
    #: Inputs that are given once; a sequence needs all to start.
    static: tuple[StaticInput, ...] = ()
    #: Sample rates in Hz, by name, of inputs where each time step is the next piece of a signal, such as sound. For
    #: clients only; no result depends on the rates.
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of `model.onnx`; sessions and snapshots are bound to it."""
        return self.files["model.onnx"]

    def blank_row(self) -> np.ndarray:
        """Return the state row that a sequence starts from, with zeros for static inputs: (state_size,) float32."""
        if self.initial_state is None:
            return np.zeros(self.state_size, np.float32)
        return np.array(self.initial_state, np.float32)

    def initial_row(self, static: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Return the state row that a sequence starts from: (state_size,) float32.

        Raises:
            ValueError: A static input is missing, unknown, of another shape, or out of range.
        """
        row, given = self.blank_row(), static or {}
        names = sorted(spec.name for spec in self.static)
        if names != sorted(given):
            raise ValueError(f"a sequence needs the static inputs {names}, not {sorted(given)}")
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
        # Omit fields that earlier releases do not know, unless they have information.
        left_out: dict[str, Any] = {
            group: {i: {"nan"} for i, tensor in enumerate(getattr(self, group)) if not tensor.nan}
            for group in ("inputs", "outputs")
        }
        return _ADAPTER.dump_json(self, indent=2, exclude=left_out | ({} if self.rates else {"rates": True})) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read a manifest. Raises ValueError if it is invalid or inconsistent."""
        manifest = _ADAPTER.validate_json(text)
        json.loads(text, object_pairs_hook=_without_repetition)
        manifest._check()
        return manifest  # type: ignore[return-value]

    def _check(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not supported by this release")
        check_name(self.name, self.version)
        self._check_bounds()
        names = [tensor.name for tensor in self.inputs + self.outputs] + [spec.name for spec in self.static]
        if not self.inputs or not self.outputs:
            raise ValueError("a model needs at least one input and one output")
        if len(set(names)) != len(names) or RESERVED_NAMES & set(names):
            raise ValueError(f"tensor names repeat or are reserved: {names}")
        if not all(tensor.time for tensor in self.inputs):
            raise ValueError("an input has no time axis")
        offset = 0
        for slot in self.state:
            if slot.offset != offset or slot.size < 1:
                raise ValueError(f"the state row has a gap or an overlap at offset {offset}")
            offset += slot.size
        if offset != self.state_size or not self.state:
            raise ValueError(f"state_size is {self.state_size}, but the slots have {offset} values")
        static = [(slot.offset, slot.size) for slot in self.state if slot.kind == "static"]
        if static != [(spec.offset, spec.size) for spec in self.static]:
            raise ValueError("the static inputs do not match their slots in the state row")
        if self.initial_state is not None and len(self.initial_state) != self.state_size:
            raise ValueError("initial_state does not have state_size values")
        if {entry.output for entry in self.parity} != {tensor.name for tensor in self.outputs} | {"state_out"}:
            raise ValueError("parity must cover every output and state_out")
        if not self.rates.keys() <= {tensor.name for tensor in self.inputs}:
            raise ValueError("a rate belongs to an unknown input")
        if self.streamable != (self.not_streamable_because is None):
            raise ValueError("streamable and not_streamable_because contradict each other")

    def _check_bounds(self) -> None:
        """Check that sizes are within limits, numbers are finite, and texts have no control characters."""
        tensors: tuple[TensorSpec | StaticInput, ...] = (*self.inputs, *self.outputs, *self.static)
        if len(tensors) > _MOST_TENSORS or len(self.state) > _MOST_SLOTS or not 0 < self.state_size <= _MOST_STATE:
            raise ValueError(
                f"it has more than {_MOST_TENSORS} tensors, {_MOST_SLOTS} pieces of state, or a state_size that is not "
                f"from 1 to {_MOST_STATE}"
            )
        for tensor in tensors:
            if len(tensor.shape) > _MOST_DIMENSIONS or min(tensor.shape, default=1) < 1 or tensor.size > _MOST_VALUES:
                raise ValueError(
                    f"a tensor's feature shape holds a size below 1, or has more than {_MOST_DIMENSIONS} dimensions or "
                    f"{_MOST_VALUES} values"
                )
            if tensor.limit is not None and not 0 < tensor.limit <= _MOST_LIMIT:
                raise ValueError(f"the limit of {tensor.name[:80]!a} is not from 1 to {_MOST_LIMIT}")
            if isinstance(tensor, TensorSpec) and tensor.nan and (tensor.dtype != "float32" or tensor in self.outputs):
                raise ValueError("only an input of float32 can hold NaN")
            if not 0 < len(tensor.name) <= _LONGEST_NAME:
                raise ValueError(f"a tensor's name has no or more than {_LONGEST_NAME} characters")
        for text in self._texts():
            if len(text) > _LONGEST_TEXT or not text.replace("\n", "").isprintable():
                raise ValueError(f"a text is too long or cannot be printed: {text[:80]!a}")
        if not all(0 <= value < inf for each in self.parity for value in (each.onnxruntime, each.tolerance)):
            raise ValueError("parity holds a value that is negative or not finite")
        if not all(0 < rate < inf for rate in self.rates.values()):
            raise ValueError("a rate is not a finite number above 0")
        if not all(map(isfinite, np.array(self.initial_state or (), np.float32))):
            raise ValueError("initial_state holds a value that is not finite")

    def _texts(self) -> Iterator[str]:
        yield from (tensor.name.replace("\n", "\0") for tensor in self.inputs + self.outputs)
        yield from (tensor.name.replace("\n", "\0") for tensor in self.static)
        yield from (slot.module for slot in self.state)
        yield from (text for pair in (*self.tools.items(), *self.files.items()) for text in pair)
        yield self.not_streamable_because or ""


def check_name(name: str, version: str) -> None:
    """Check that name and version are safe as a folder and in a URL. Raises BundleError (`bundle_name`)."""
    if not is_name(name):
        raise BundleError("bundle_name", f"model name {name[:80]!a}: use letters, digits, _ and - (at most 64)")
    if not is_version(version):
        raise BundleError(
            "bundle_name",
            f"version {version[:80]!a}: use up to 18 digits, without a leading zero, as in 1 or 20261129",
        )


def is_name(text: str) -> bool:
    return _MODEL_NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    return _MODEL_VERSION.fullmatch(text) is not None


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member is repeated")
    return found


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
