"""Parses command-line arguments: `NAME:DTYPE:SHAPE` for forward, `NAME=VALUE` for a factory. Does not import torch."""

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from unroll.bundle.manifest import Dtype

#: The manifest's dtypes, repeated because importing the manifest is slow.
_DTYPES: "dict[str, Dtype]" = {"float32": "float32", "int64": "int64", "int32": "int32", "bool": "bool"}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One `--input`: an argument of forward, with the dtype and shape of one time step."""

    name: str
    dtype: "Dtype"
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `NAME:DTYPE:SHAPE`, such as `x:float32:64`, `grid:float32:8x3` or `token:int64:`."""
        try:
            name, dtype, shape = text.split(":")
            sizes = tuple(int(size) for size in shape.split("x")) if shape else ()
            if not name.isidentifier() or any(size < 1 for size in sizes):
                raise ValueError
            return cls(name, _DTYPES[dtype], sizes)
        except (ValueError, KeyError):
            raise ValueError(
                f"{text!r} is not NAME:DTYPE:SHAPE (DTYPE: {', '.join(_DTYPES)}; SHAPE such as 64 or 8x3, empty for "
                "a single value: x:int64:)"
            ) from None


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One `--state`: an argument that forward returns for its next call.

    Attributes:
        name: the argument.
        output: the output that continues it.
        parts: the dtype and shape of one row, and the batch axis, of each tensor of a tuple; none for an argument that
            the first call omits.
    """

    name: str
    output: str
    parts: tuple[tuple[InputSpec, int], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `NAME:DTYPE:SHAPE=OUTPUT`: `cache:float32:2x64=y1`, `hc:float32:2xBx64,2xBx64=y1` or `hx=y1`."""
        spec, equals, output = text.partition("=")
        if not equals or not output:
            raise ValueError(f"{text!r} is not NAME:DTYPE:SHAPE=OUTPUT")
        if spec.isidentifier():
            return cls(spec, output, ())
        argument, _, shapes = spec.rpartition(":")
        return cls(argument.partition(":")[0], output, tuple(_state(argument, shape) for shape in shapes.split(",")))


def _state(argument: str, shape: str) -> tuple[InputSpec, int]:
    sizes = shape.split("x")
    axis = sizes.index("B") if "B" in sizes else 0
    row = "x".join(size for number, size in enumerate(sizes) if size != "B" or number != axis)
    return InputSpec.parse(f"{argument}:{row}"), axis


def input_rate(text: str) -> tuple[str, float]:
    """Parse `NAME=RATE`, such as `samples=16000`."""
    name, _, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not name.isidentifier() or not 0 < rate < float("inf"):
        raise ValueError(f"{text!r} is not NAME=RATE, as in samples=16000")
    return name, rate


def factory_argument(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`, such as `hidden=128`, `sizes=(3, 4)` or `cell=gru`; all but Python literals are strings."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not NAME=VALUE, as in hidden=128")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
