"""What the command line says of arguments: of forward, `NAME:DTYPE:SHAPE`; of a factory, `NAME=VALUE`. No torch."""

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from unroll.bundle.manifest import Dtype

#: Those of the manifest, which takes long to import.
_DTYPES: "dict[str, Dtype]" = {"float32": "float32", "int64": "int64", "int32": "int32", "bool": "bool"}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One `--input`: an argument of forward, and what one time step of it holds."""

    name: str
    dtype: "Dtype"
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME:DTYPE:SHAPE`, such as `x:float32:64`, `grid:float32:8x3` or `token:int64:`."""
        try:
            name, dtype, shape = text.split(":")
            sizes = tuple(int(size) for size in shape.split("x")) if shape else ()
            if not name.isidentifier() or any(size < 1 for size in sizes):
                raise ValueError
            return cls(name, _DTYPES[dtype], sizes)
        except (ValueError, KeyError):
            raise ValueError(
                f"{text!r} is not NAME:DTYPE:SHAPE (DTYPE: {', '.join(_DTYPES)}; SHAPE such as 64, 8x3 or empty)"
            ) from None


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One `--state`: an argument that forward hands on itself, what a row of it holds, and the output it becomes."""

    input: InputSpec
    output: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME:DTYPE:SHAPE=OUTPUT`, such as `cache:float32:2x64=y1`."""
        spec, equals, output = text.partition("=")
        if not equals or not output:
            raise ValueError(f"{text!r} is not NAME:DTYPE:SHAPE=OUTPUT")
        return cls(InputSpec.parse(spec), output)


def input_rate(text: str) -> tuple[str, float]:
    """`NAME=RATE`, such as `samples=16000`."""
    name, _, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not name.isidentifier() or not 0 < rate < float("inf"):
        raise ValueError(f"{text!r} is not NAME=RATE, as in samples=16000")
    return name, rate


def factory_argument(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, such as `hidden=128`, `sizes=(3, 4)` or `cell=gru`: what is no literal of Python is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not NAME=VALUE, as in hidden=128")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
