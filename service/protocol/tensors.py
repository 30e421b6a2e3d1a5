"""A model's inputs and outputs as raw bytes and as JSON, checked against its manifest.

No value is converted silently. A float in place of an integer, a string that looks like a number, a missing dimension
or a value out of range is an error, which names the tensor and the expected type, shape or range.
"""

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from unroll.bundle import Manifest, TensorSpec
from unroll.service.core.errors import InvalidDtype, InvalidShape, NonFiniteInput, OutOfRange, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.engine.rows import FEW, all_finite
from unroll.service.protocol import json

#: Accepted types of JSON values, by the kind of the tensor's dtype.
_ACCEPTED: dict[str, set[type]] = {"f": {float, int}, "i": {int}, "b": {bool}}

#: Dtypes that clients send by mistake, by the tensor's dtype and the size of a value.
_MISTAKEN = {
    "float32": {8: "float64, NumPy's default", 2: "float16"},
    "int64": {4: "int32"},
    "int32": {8: "int64, NumPy's default", 2: "int16"},
    "bool": {4: "int32 or float32", 8: "int64 or float64"},
}

#: If the sum of squares is below this, every value is finite in float32.
_FAR_FROM_OVERFLOW = 1e70


class Codec:
    """Encodes and decodes the tensors of one model: (time, *shape) each, and (*shape) for outputs without time.

    Args:
        max_steps: Maximum number of time steps per request.
        max_sequences: Maximum number of sequences per request.
    """

    def __init__(self, manifest: Manifest, max_steps: int, max_sequences: int) -> None:
        self._manifest = manifest
        self.inputs = manifest.inputs
        self.outputs = manifest.outputs
        self.max_steps = max_steps
        self.max_sequences = max_sequences
        self._raw_step = sum(spec.nbytes for spec in self.inputs)

    # ── raw bytes: little-endian, row-major, tensor after tensor ─────────────────────────────────

    def from_raw(self, body: bytes, steps: int | None) -> Tensors:
        """Decode raw bytes. steps: T as sent by the client, since the length alone is ambiguous; None: one step."""
        count = 1 if steps is None else steps
        if len(body) != count * self._raw_step or not count:
            raise self._wrong_length(body, steps)
        if len(self.inputs) == 1:
            spec = self.inputs[0]
            return (self.checked(spec, from_bytes(spec, body, (count, *spec.shape))),)
        begin, arrays = 0, []
        for spec in self.inputs:
            end = begin + count * spec.nbytes
            arrays.append(self.checked(spec, from_bytes(spec, memoryview(body)[begin:end], (count, *spec.shape))))
            begin = end
        return tuple(arrays)

    def sequence_from_raw(self, body: bytes, steps: int | None) -> Tensors:
        """`from_raw` for a whole sequence, where the client must send the number of steps."""
        if steps is None:
            raise self._wrong_length(body, steps)
        return self.from_raw(body, steps)

    def _wrong_length(self, body: bytes, steps: int | None) -> InvalidShape:
        spec, each, size = self.inputs[0], self._raw_step, len(body)
        fitting = 0 if size % each else size // each
        of = f"of {spec.name!r} is {each} bytes of {spec.dtype}" if len(self.inputs) == 1 else f"is {each} bytes"
        message = f"a time step {of}, but the body has {size}"
        if steps is not None:
            message += f" for {steps} steps"
        elif fitting:
            message += f"; if it has {fitting} steps, send Unroll-Steps: {fitting}"
        if len(self.inputs) == 1:
            return InvalidShape(message + dtype_hint(spec, size, each, steps))
        layout = ", ".join(f"{spec.name!r} ({spec.nbytes} bytes of {spec.dtype})" for spec in self.inputs)
        return InvalidShape(f"{message}; it has all steps of the first input, then those of the next: {layout}")

    def to_raw(self, outputs: Tensors) -> bytes:
        return outputs[0].tobytes() if len(outputs) == 1 else b"".join([array.tobytes() for array in outputs])

    @staticmethod
    def rows_to_raw(outputs: Sequence[np.ndarray]) -> list[bytes]:
        """`to_raw` per row of single steps. outputs: each (rows, 1, *shape), or (rows, *shape) without time."""
        columns = []
        for array in outputs:
            content, size = array.tobytes(), array.nbytes // len(array)
            columns.append([content[begin : begin + size] for begin in range(0, len(content), size)])
        return columns[0] if len(columns) == 1 else [b"".join(row) for row in zip(*columns, strict=True)]

    # ── JSON ─────────────────────────────────────────────────────────────────────────────────────

    def from_json(self, value: Any) -> Tensors:
        """`[step, ...]`, or `{name: [step, ...]}` for a model with several inputs."""
        if len(self.inputs) == 1 and isinstance(value, list):
            return (self._from_list(self.inputs[0], value),)
        arrays = tuple(
            self._from_list(spec, item) for spec, item in zip(self.inputs, self._by_name(value), strict=True)
        )
        if len({len(array) for array in arrays}) > 1:
            raise InvalidShape("the inputs differ in their number of time steps")
        return arrays

    def step_from_json(self, value: Any) -> bytes | None:
        """The concatenated inputs of one step in the form of `from_json`; None if there are more steps."""
        if len(self.inputs) == 1 and len(self.inputs[0].shape) == 1 and isinstance(value, list) and len(value) == 1:
            packed = pack(self.inputs[0], value[0])
            if packed is not None:
                return packed
        inputs = self.from_json(value)
        return self.to_raw(inputs) if len(inputs[0]) == 1 else None

    def sequences_from_json(self, value: Any) -> list[Tensors]:
        """`[sequence, ...]` (lengths may differ), or `{name: [sequence, ...]}`."""
        columns = self._by_name(value)
        if not all(isinstance(column, list) and column for column in columns):
            raise InvalidShape("'inputs' must be a list of one or more sequences")
        if len({len(column) for column in columns}) > 1:
            raise InvalidShape("the inputs differ in their number of sequences")
        self.check_sequences(len(columns[0]))
        several = len(self.inputs) > 1
        names = [spec.name for spec in self.inputs]
        return [
            self.from_json(dict(zip(names, items, strict=True)) if several else items[0])
            for items in zip(*columns, strict=True)
        ]

    def initial_row(self, static: Any) -> np.ndarray | None:
        """The initial state row of a sequence with these static inputs; None for the model's initial state.

        Args:
            static: {name: value}, as received.

        Raises:
            InvalidShape: The names or shapes differ from the model's static inputs.
            OutOfRange: A value is outside its range.
        """
        specs, given = self._manifest.static, {} if static is None else static
        if not isinstance(given, dict) or given.keys() != {spec.name for spec in specs}:
            names = [spec.name for spec in specs]
            raise InvalidShape(
                f"'static' must name the model's static inputs: {names}" if names else "the model has no static inputs"
            )
        if not specs:
            return None
        values = {}
        for spec in specs:
            tensor = TensorSpec(spec.name, spec.dtype, spec.shape, False, spec.limit)
            array = numbers(tensor, [given[spec.name]])[0]
            if array.shape != spec.shape:
                raise InvalidShape(f"{spec.name!r} must have the shape {spec.shape}, not {array.shape}")
            self._check_limit(tensor, array)
            values[spec.name] = array
        try:
            return self._manifest.initial_row(values)
        except ValueError as error:
            raise OutOfRange(str(error)) from error

    def initial_rows(self, static: Any, count: int) -> list[np.ndarray | None]:
        """`initial_row` for `count` sequences. static: {name: [value, ...]}, as received."""
        if not isinstance(static, dict) or not all(isinstance(v, list) and len(v) == count for v in static.values()):
            if static is None and not self._manifest.static:
                return [None] * count
            raise InvalidShape("'static' must have a list with one value per sequence for each static input")
        return [self.initial_row({name: values[i] for name, values in static.items()}) for i in range(count)]

    def check_sequences(self, count: int) -> None:
        """Raises InvalidShape if a request has too many sequences. Call it before decoding them."""
        if count > self.max_sequences:
            raise InvalidShape(f"{count} sequences in one request; at most {self.max_sequences} are allowed")

    def to_json(self, outputs: Tensors) -> object:
        """The value of `"outputs"`: the array, or `{name: array}` for a model with several outputs."""
        return outputs[0] if len(outputs) == 1 else _named(self.outputs, outputs)

    def rows_to_json(self, outputs: Tensors) -> list[bytes]:
        """The text of `to_json` per row of single steps. outputs: as for `rows_to_raw`."""
        columns = [json.dump_rows(array) for array in outputs]
        if len(columns) == 1:
            return columns[0]
        form = b"{" + b",".join([json.dump(spec.name).replace(b"%", b"%%") + b":%b" for spec in self.outputs]) + b"}"
        return [form % row for row in zip(*columns, strict=True)]

    def inputs_to_json(self, inputs: Tensors) -> object:
        """The value of `"inputs"`, in the form of `to_json`."""
        return inputs[0] if len(inputs) == 1 else _named(self.inputs, inputs)

    def sequences_to_json(self, sequences: list[Tensors]) -> object:
        if len(self.outputs) == 1:
            return [outputs[0] for outputs in sequences]
        return {spec.name: [outputs[i] for outputs in sequences] for i, spec in enumerate(self.outputs)}

    def checked(self, spec: TensorSpec, array: np.ndarray, *, batch: bool = False) -> np.ndarray:
        """Return the array if it is a valid input of this model; otherwise raise InvalidRequest.

        array: (time, *shape), or with `batch`, (batch, time, *shape).
        """
        self._check_shape(spec, array[0] if batch else array)
        if spec.dtype == "float32" and not all_finite(array) and not (spec.nan and not np.isinf(array).any()):
            raise _non_finite(spec)
        self._check_limit(spec, array)
        return array

    def faults(self, inputs: Tensors) -> dict[int, UnrollError]:
        """Errors of single steps with invalid values, by row. inputs: each (rows, 1, *shape)."""
        found: dict[int, UnrollError] = {}
        for spec, array in zip(self.inputs, inputs, strict=True):
            if valid_values(spec, array) is None:
                continue
            for row, values in enumerate(array):
                try:
                    self.checked(spec, from_bytes(spec, values.tobytes(), values.shape))
                except UnrollError as error:
                    found.setdefault(row, error)
        return found

    def _from_list(self, spec: TensorSpec, value: Any) -> np.ndarray:
        array = numbers(spec, value)
        self._check_shape(spec, array)
        self._check_limit(spec, array)
        return array

    def _check_shape(self, spec: TensorSpec, array: np.ndarray) -> None:
        if array.shape[1:] != spec.shape or not len(array):
            raise InvalidShape(
                f"{spec.name!r} must have the shape (T, {', '.join(map(str, spec.shape))}) with T >= 1, "
                f"not {array.shape}"
            )
        if len(array) > self.max_steps:
            raise InvalidShape(f"{len(array)} time steps in one request; at most {self.max_steps} are allowed")

    def _check_limit(self, spec: TensorSpec, array: np.ndarray) -> None:
        if spec.limit is not None and (array.min() < 0 or array.max() >= spec.limit):
            raise OutOfRange(f"{spec.name!r} must be in 0 … {spec.limit - 1}")

    def _by_name(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            names = [spec.name for spec in self.inputs]
            if set(value) != set(names):
                raise InvalidShape(f"'inputs' has {sorted(value)}; the model's inputs are {names}")
            return [value[name] for name in names]
        if len(self.inputs) > 1:
            raise InvalidShape(f"'inputs' must name the model's inputs: {[spec.name for spec in self.inputs]}")
        return [value]


def _named(specs: Sequence[TensorSpec], arrays: Tensors) -> dict[str, np.ndarray]:
    return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}


def valid_values(spec: TensorSpec, array: np.ndarray) -> np.ndarray | None:
    """A mask of the valid values; None if all are valid."""
    if spec.dtype == "float32":
        valid = ~np.isinf(array) if spec.nan else np.isfinite(array)
    elif spec.dtype == "bool":
        valid = array.view(np.uint8) < 2
    elif spec.limit is not None:
        valid = (array >= 0) & (array < spec.limit)
    else:
        return None
    return valid if b"\0" in valid.tobytes() else None  # twice as fast as valid.all() for one step


def pack(spec: TensorSpec, values: Any) -> bytes | None:
    """Pack a flat list of floats of the right length; None for anything else, which `numbers` may still accept."""
    if spec.dtype != "float32" or not isinstance(values, list) or len(values) != spec.size:
        return None
    try:
        return struct.pack(f"<{spec.size}f", *values) if {*map(type, values)} == {float} else None
    except OverflowError:  # too large for float32
        return None


def numbers(spec: TensorSpec, value: Any) -> np.ndarray:
    """Convert a nested or flat JSON list to an array of the tensor's dtype; the caller checks its shape.

    Types and lengths are checked before NumPy sees a value, because NumPy would allocate the longest string's size for
    every element.
    """
    values, shape = _flat(spec, value)
    if spec.nan and None in values:
        values = [math.nan if value is None else value for value in values]
    if values and not _ACCEPTED[spec.numpy.kind].issuperset(map(type, values)):
        raise InvalidDtype(f"{spec.name!r} must contain values of type {spec.dtype} only")
    if spec.numpy.kind == "f":
        return _floats(spec, values).reshape(shape)
    try:
        return np.array(values, spec.numpy).reshape(shape)
    except OverflowError as error:
        raise OutOfRange(f"{spec.name!r} holds values that do not fit {spec.dtype}") from error


def _flat(spec: TensorSpec, value: Any) -> tuple[list[Any], list[int]]:
    """Flatten a nested list into its values and shape. Raises InvalidShape if its rows differ in length."""
    if not isinstance(value, list):
        raise InvalidShape(f"{spec.name!r} must be a list")
    values, shape = value, [len(value)]
    while values and list in (kinds := set(map(type, values))):
        lengths = set(map(len, values)) if len(kinds) == 1 else ()
        if len(lengths) != 1:
            raise InvalidShape(f"{spec.name!r} is not a regular array: its rows differ in length")
        if len(shape) == len(spec.shape) + 2:  # batch and time
            raise InvalidShape(f"{spec.name!r} is nested more deeply than any shape it may have")
        values = values[0] if len(values) == 1 else [*chain.from_iterable(values)]
        shape += lengths
    return values, shape


def _floats(spec: TensorSpec, values: list[float]) -> np.ndarray:
    try:
        array = np.array(values)
        if array.size <= FEW and np.vdot(array, array) < _FAR_FROM_OVERFLOW:
            return array.astype(spec.numpy)
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinity
            converted = array.astype(spec.numpy)
    except OverflowError:  # a whole number larger than any float
        raise _non_finite(spec) from None
    if not (np.isfinite(converted) | (spec.nan & np.isnan(converted))).all():
        raise _non_finite(spec)
    return converted


def _non_finite(spec: TensorSpec) -> NonFiniteInput:
    return NonFiniteInput(f"{spec.name!r} holds {'' if spec.nan else 'NaN, '}infinity or a value too large for float32")


def dtype_hint(spec: TensorSpec, size: int, each: int, steps: int | None) -> str:
    """A hint for an error about `size` bytes that are not `steps` times `each`: the dtype probably sent, else ''.

    Without `steps`, the bytes may be one step or, with a wider dtype, several.
    """
    for itemsize, dtype in _MISTAKEN[spec.dtype].items():
        count, rest = divmod(size * spec.numpy.itemsize, each * itemsize)
        several = steps is None and count > 1 and itemsize > spec.numpy.itemsize
        if not rest and (several or count == (steps or 1)):
            return f"; if its values are {dtype}, send them as {spec.dtype}: array.astype({spec.numpy.str!r})"
    return ""


def from_bytes(spec: TensorSpec, content: bytes | memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """A view of little-endian values with the tensor's dtype and this shape.

    Raises OutOfRange for a bool that is neither 0 nor 1.
    """
    if spec.dtype == "bool" and np.frombuffer(content, np.uint8).max(initial=0) > 1:
        raise OutOfRange(f"{spec.name!r} must hold bytes 0 or 1")
    return np.ndarray(shape, spec.numpy, content)
