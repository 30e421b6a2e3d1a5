"""A model as described by its server, and conversions of its inputs and outputs.

Arrays may come from anything with the buffer protocol or DLPack: NumPy, PyTorch, JAX, CuPy. Shapes and dtypes are
checked against the model before anything is sent.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from unroll.client.errors import InvalidInput

#: An array for a model with one output, otherwise a dict of arrays by name. It is Any because the model decides.
Arrays = Any
#: Anything that converts to an array.
ArrayLike = Any

#: The dtype kinds that convert to each kind of a model's dtype. Floats never become integers.
_TAKEN = {"f": "fiu", "i": "iu", "b": "b"}


class PrecisionWarning(UserWarning):
    """Values were rounded to the model's precision."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model.

    Attributes:
        name: The name in the model's forward.
        dtype: float32, int64, int32 or bool.
        shape: The shape of one time step.
        time: True for one value per time step, False for a single value after the last step.
        rate: Values per second, for an input that carries a signal; None if not declared.
        nan: Whether NaN may stand for a missing value.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    time: bool = True
    rate: float | None = None
    nan: bool = False

    @cached_property
    def numpy(self) -> np.dtype:
        """The NumPy dtype: little-endian, as on the wire."""
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A version of a model, as described by its server.

    Attributes:
        name, version: Its name and version.
        digest: Identifies the bundle.
        inputs, outputs: Its inputs and outputs.
        static: Inputs that are given once, when a session opens.
        streamable: Whether sessions are possible.
        not_streamable_because: Why sessions are not possible, or None.
        description: The full document of `GET /v1/models/{name}`.
    """

    name: str
    version: str
    digest: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    static: tuple[Tensor, ...]
    streamable: bool
    not_streamable_because: str | None
    description: dict[str, Any] = field(repr=False)
    _rounded: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Model":
        def tensors(group: str) -> tuple[Tensor, ...]:
            return tuple(
                Tensor(
                    t["name"],
                    t["dtype"],
                    tuple(t["shape"]),
                    t.get("time", False),
                    t.get("rate"),
                    t.get("nan", False),
                )
                for t in document[group]
            )

        return cls(
            name=document["name"],
            version=document["version"],
            digest=document["digest"],
            inputs=tensors("inputs"),
            outputs=tensors("outputs"),
            static=tensors("static"),
            streamable=document["streamable"],
            not_streamable_because=document["not_streamable_because"],
            description=document,
        )

    def inputs_of(self, values: ArrayLike, leading: Literal["", "T", "N", "NT"]) -> list[np.ndarray]:
        """Convert inputs to contiguous arrays, in the model's order and dtypes.

        Args:
            values: An array, or a dict with an array per input.
            leading: The axes in front of a time step's shape.

        Raises:
            InvalidInput: A name, a shape or a dtype does not fit.
        """
        arrays = [self._converted(spec, value) for spec, value in zip(self.inputs, self._by_name(values), strict=True)]
        for spec, array in zip(self.inputs, arrays, strict=True):
            axes = array.ndim - len(spec.shape)
            if axes != len(leading) or array.shape[axes:] != spec.shape or array.shape[:axes] != arrays[0].shape[:axes]:
                raise InvalidInput(self._wrong_shape(spec, array, leading))
        if not all(arrays[0].shape[: len(leading)]):
            raise InvalidInput(f"{self.inputs[0].name!r} is empty: its shape is {arrays[0].shape}")
        return arrays

    def static_of(self, values: Mapping[str, ArrayLike] | None) -> dict[str, Any] | None:
        """Convert static inputs to JSON values. Raises InvalidInput."""
        given = {} if values is None else dict(values)
        names = [spec.name for spec in self.static]
        if given.keys() != set(names):
            expected = f"{self.name!r} needs {names}" if names else f"{self.name!r} has none"
            raise InvalidInput(f"static inputs {sorted(given)} were given, and {expected}")
        converted = {spec.name: self._converted(spec, given[spec.name]) for spec in self.static}
        for spec in self.static:
            if converted[spec.name].shape != spec.shape:
                raise InvalidInput(
                    f"static input {spec.name!r} has the shape {converted[spec.name].shape}, and {self.name!r} takes "
                    f"{spec.shape}"
                )
        return {name: array.tolist() for name, array in converted.items()} or None

    def outputs_of(self, arrays: Sequence[np.ndarray]) -> Arrays:
        """Return a single array, or a dict of several."""
        return named(self.outputs, arrays)

    def last_step(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs of a chunk's last time step."""
        return [array[-1] if spec.time else array for spec, array in zip(self.outputs, outputs, strict=True)]

    def given_outputs(self, values: ArrayLike) -> list[np.ndarray]:
        """Check outputs of a time step that a caller passes back. Raises InvalidInput."""
        names = [spec.name for spec in self.outputs]
        values = values if isinstance(values, Mapping) else {names[0]: values}
        if values.keys() != set(names):
            raise InvalidInput(f"outputs {sorted(map(str, values))} were given, and {self.name!r} has {names}")
        arrays = [self._converted(spec, values[spec.name]) for spec in self.outputs]
        for spec, array in zip(self.outputs, arrays, strict=True):
            if array.shape != spec.shape:
                raise InvalidInput(
                    f"output {spec.name!r} has the shape {array.shape}, and {self.name!r} gives {spec.shape}"
                )
        return arrays

    def _by_name(self, values: ArrayLike) -> list[ArrayLike]:
        names = [spec.name for spec in self.inputs]
        if isinstance(values, Mapping):
            if values.keys() != set(names):
                raise InvalidInput(f"inputs {sorted(map(str, values))} were given, and {self.name!r} takes {names}")
            return [values[name] for name in names]
        if len(names) > 1:
            raise InvalidInput(f"{self.name!r} takes {len(names)} inputs: give a dict with {names}")
        return [values]

    def _converted(self, spec: Tensor, value: ArrayLike) -> np.ndarray:
        array = as_numpy(spec.name, value)
        if array.dtype == spec.numpy:
            return np.ascontiguousarray(array).reshape(array.shape)
        target = spec.numpy
        if array.dtype.kind not in _TAKEN[target.kind]:
            raise InvalidInput(f"{spec.name!r} has values of type {array.dtype}, and {self.name!r} takes {spec.dtype}")
        with np.errstate(over="ignore"):
            converted = np.asarray(array, target, order="C")
        if array.dtype.kind in "iu":
            if not np.array_equal(converted, array):
                raise InvalidInput(f"{spec.name!r} has values that {spec.dtype} cannot hold")
        elif hasattr(value, "dtype") and array.itemsize > target.itemsize and spec.name not in self._rounded:
            self._rounded.add(spec.name)
            warnings.warn(
                f"{self.name!r} takes {spec.name!r} as {spec.dtype}; values of {array.dtype} are rounded. "
                f"Convert them with .astype({spec.dtype!r}) to silence this",
                PrecisionWarning,
                stacklevel=2,
            )
        return converted

    def _wrong_shape(self, spec: Tensor, array: np.ndarray, leading: str) -> str:
        takes = f"({', '.join([*leading, *map(str, spec.shape)])}{',' if len(leading) + len(spec.shape) == 1 else ''})"
        message = f"{spec.name!r} has the shape {array.shape}, and {self.name!r} takes {takes} here"
        axes = array.ndim - len(spec.shape)
        if array.shape[max(axes, 0) :] == spec.shape and axes != len(leading):
            if leading == "" and axes == 1:
                message += "; `steps` takes several time steps"
            elif leading == "T" and axes == 0:
                message += "; `step` takes one time step"
            elif leading == "T" and axes == 2:
                message += "; a session has no batch axis"
        return message


def named(specs: Sequence[Tensor], values: Sequence[Any]) -> Any:
    """A single value, or a dict of several by name."""
    return values[0] if len(specs) == 1 else {spec.name: value for spec, value in zip(specs, values, strict=True)}


def listed(specs: Sequence[Tensor], value: Any) -> list[Any]:
    """The values that `named` was given."""
    return [value] if len(specs) == 1 else [value[spec.name] for spec in specs]


def as_numpy(name: str, value: ArrayLike) -> np.ndarray:
    """Convert to an array in host memory, without a copy where possible. Raises InvalidInput."""
    if isinstance(value, np.ndarray):
        return value
    try:
        if hasattr(value, "__dlpack__"):
            try:
                return np.from_dlpack(value)
            except (BufferError, RuntimeError, TypeError):
                return np.from_dlpack(value, device="cpu", copy=True)
        return np.asarray(value)
    except Exception as error:
        raise InvalidInput(f"{name!r} cannot be read as an array: {error}{_advice(value)}") from error


def _advice(value: ArrayLike) -> str:
    if getattr(value, "requires_grad", False):
        return "; pass .detach()"
    return "; move it to the CPU first" if hasattr(value, "__dlpack__") else ""
