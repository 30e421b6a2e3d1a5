"""Rollout maps compute the inputs of a time step from the previous outputs.

Every map is exact, so that a client can reproduce it bit for bit:

- `identity`: the output is the input.
- `argmax`: the index of the output's largest value; the first one among equals.
- `sample`: an index drawn from softmax(output / temperature), in float64, among the `top_k` largest. The draw u is a
  SplitMix64 number that depends on the seed and on the position of the step that receives it, see `draw`. The index is
  the first whose cumulative sum of exp((logit - largest) / temperature) exceeds u times the total, else the last.
- `columns`: each value of the input separately: a value of the output times `scale` plus `offset`, computed in float64
  and rounded once; a constant; or a value per step from the request.

An index becomes the value of an integer input, or a one-hot row of a float input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from unroll.bundle import Manifest, TensorSpec
from unroll.service.api.bodies import MAX_ITEMS, Strict
from unroll.service.core.errors import EngineFailed, InvalidShape, MapInvalid, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.protocol.tensors import Codec, numbers

_MASK = 2**64 - 1
#: Larger integers are not read exactly by every JSON parser.
MAX_SEED = 2**53 - 1


def draw(seed: int, position: int) -> float:
    """A number in [0, 1) for the step at `position`: the top 53 bits of SplitMix64's output number `position`."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return float(((z ^ (z >> 31)) >> 11) * 2.0**-53)


class _Source(Strict):
    output: str | None = Field(None, description="name of the output; optional if the model has only one")


class Identity(_Source):
    kind: Literal["identity"]


class Argmax(_Source):
    kind: Literal["argmax"]


class Sample(_Source):
    kind: Literal["sample"]
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, description="draw from this many of the largest; default: all")
    seed: int = Field(ge=0, le=MAX_SEED)


class FromColumn(Strict):
    from_: int = Field(alias="from", ge=0, description="index into the output's values")
    scale: float = Field(1.0, allow_inf_nan=False)
    offset: float = Field(0.0, allow_inf_nan=False)


class ConstantColumn(Strict):
    constant: int | float | bool


def _only_numbers(values: list[Any]) -> list[Any]:
    """Faster than a union of types, which pydantic tries one after another for each value."""
    if not {int, float, bool}.issuperset(map(type, values)):
        raise PydanticCustomError("numbers", "Input should be a list of numbers, true and false")
    return values


class FutureColumn(Strict):
    future: Annotated[list[Any], AfterValidator(_only_numbers)] = Field(
        description="one value for each step that is fed back",
        json_schema_extra={"items": {"type": ["number", "boolean"]}},
    )


#: Each alternative has a member that no other has, so at most one fits.
Column = Annotated[FromColumn | ConstantColumn | FutureColumn, Field(union_mode="left_to_right")]


class Columns(_Source):
    kind: Literal["columns"]
    columns: Annotated[list[Column], Field(max_length=MAX_ITEMS, fail_fast=True)] = Field(
        description="one for each value of the input, in row-major order"
    )


Source = Annotated[Identity | Argmax | Sample | Columns, Field(discriminator="kind")]


def _form(value: Any) -> str:
    is_one = isinstance(value.get("kind"), str) if isinstance(value, dict) else isinstance(value, _Source)
    return "input" if is_one else "inputs"


#: Either the source of a model's only input, or {input: source}.
FeedbackSpec = Annotated[
    Annotated[Source, Tag("input")] | Annotated[dict[str, Source], Tag("inputs")], Discriminator(_form)
]

#: Computes the values of one input from the flat output, the step's position, and the number of steps fed back before.
_Fill = Callable[[np.ndarray, int, int], object]


@dataclass(frozen=True, slots=True)
class _Bound:
    """A validated source: the input that it fills, and the index of the output that it reads."""

    spec: TensorSpec
    output: int
    fill: _Fill


class Feedback:
    """A map bound to a model.

    Args:
        steps: Number of steps that are fed back.
        begin: Position of the first of these steps.

    Raises:
        MapInvalid: The map does not fit the model.
    """

    def __init__(self, spec: Any, codec: Codec, manifest: Manifest, steps: int, begin: int) -> None:
        self._codec = codec
        self._begin = begin
        self._outputs = manifest.outputs
        by_name = spec if isinstance(spec, dict) else {manifest.inputs[0].name: spec}
        names = [tensor.name for tensor in manifest.inputs]
        if by_name.keys() != set(names):
            given = sorted(by_name) if isinstance(spec, dict) else "one input"
            raise MapInvalid(f"the map is for {given}; the model's inputs are {names}")
        self._bound = [_bind(by_name[tensor.name], tensor, manifest.outputs, steps) for tensor in manifest.inputs]

    def __call__(self, outputs: Tensors, position: int) -> Tensors:
        """Compute the inputs of the step at `position`, each (1, *shape), from the previous piece's outputs.

        Raises:
            NonFiniteInput, OutOfRange: The model does not accept a value.
            EngineFailed: Any other error, because only an UnrollError may reach the scheduler.
        """
        try:
            last = [array[-1] if spec.time else array for spec, array in zip(self._outputs, outputs, strict=True)]
            return tuple([self._fill(bound, last[bound.output], position) for bound in self._bound])
        except UnrollError:
            raise
        except Exception as error:
            raise EngineFailed(f"the map of the rollout failed: {error}") from error

    def _fill(self, bound: _Bound, output: np.ndarray, position: int) -> np.ndarray:
        values = bound.fill(output.reshape(-1), position, position - self._begin)
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinity, and is refused
            array = np.asarray(values).astype(bound.spec.numpy).reshape(1, *bound.spec.shape)
        return self._codec.checked(bound.spec, array)


def _bind(source: Any, spec: TensorSpec, outputs: tuple[TensorSpec, ...], steps: int) -> _Bound:
    index = _output_of(source, outputs)
    output = outputs[index]
    if isinstance(source, Identity):
        if (spec.dtype, spec.shape) != (output.dtype, output.shape):
            raise _misfit(spec, output, "identity needs them equal; `columns` maps one to the other")
        return _Bound(spec, index, lambda values, position, step: values)
    if isinstance(source, Columns):
        return _Bound(spec, index, _columns(source, spec, output, steps))
    choose = _argmax if isinstance(source, Argmax) else _sampler(source, output)
    if len(output.shape) != 1 or output.dtype != "float32":
        raise _misfit(spec, output, f"{source.kind} needs a float32 output of shape (n,)")
    count = output.size
    if spec.numpy.kind == "i" and spec.size == 1:
        if spec.limit is not None and count > spec.limit:
            raise _misfit(
                spec, output, f"{source.kind} gives 0 … {count - 1}, and the input takes 0 … {spec.limit - 1}"
            )
        return _Bound(spec, index, choose)
    if spec.dtype == "float32" and spec.shape == output.shape:
        places = np.arange(count)
        return _Bound(spec, index, lambda values, position, step: places == choose(values, position, step))
    raise _misfit(spec, output, f"{source.kind} needs an input of one integer, or float32 of the output's shape")


def _output_of(source: Any, outputs: tuple[TensorSpec, ...]) -> int:
    names = [tensor.name for tensor in outputs]
    if source.output is None and len(names) == 1:
        return 0
    if source.output not in names:
        raise MapInvalid(f"the map reads the output {source.output!r}; the model's outputs are {names}")
    return names.index(source.output)


def _misfit(spec: TensorSpec, output: TensorSpec, why: str) -> MapInvalid:
    return MapInvalid(
        f"the output {output.name!r} has the shape {output.shape} of {output.dtype}, and the input {spec.name!r} takes "
        f"{spec.shape} of {spec.dtype}: {why}"
    )


def _argmax(values: np.ndarray, position: int, step: int) -> int:
    return int(np.argmax(values))


def _sampler(source: Sample, output: TensorSpec) -> Callable[[np.ndarray, int, int], int]:
    def choose(values: np.ndarray, position: int, step: int) -> int:
        scaled = values.astype(np.float64)
        scaled = (scaled - scaled.max()) / source.temperature
        weights = np.exp(scaled)
        if source.top_k is not None and source.top_k < len(values):
            weights[np.argsort(-scaled, kind="stable")[source.top_k :]] = 0.0
        sums = np.cumsum(weights)
        return int(np.searchsorted(sums[:-1], draw(source.seed, position) * sums[-1], side="right"))

    return choose


def _columns(source: Columns, spec: TensorSpec, output: TensorSpec, steps: int) -> _Fill:
    if len(source.columns) != spec.size:
        raise MapInvalid(
            f"the map has {len(source.columns)} columns; the input {spec.name!r} takes {spec.size} values, {spec.shape}"
        )
    fills = [_column(column, i, spec, output, steps) for i, column in enumerate(source.columns)]
    return lambda values, position, step: [fill(values, position, step) for fill in fills]


def _column(column: Column, i: int, spec: TensorSpec, output: TensorSpec, steps: int) -> _Fill:
    if isinstance(column, FromColumn):
        begin, scale, offset = column.from_, column.scale, column.offset
        if begin >= output.size or (spec.dtype != "float32" and (output.dtype, scale, offset) != (spec.dtype, 1, 0)):
            raise _misfit(spec, output, f"column {i} cannot be value {begin} of the output, scaled by {scale}")
        if spec.dtype != "float32":
            return lambda values, position, step: values[begin]
        return lambda values, position, step: float(values[begin]) * scale + offset
    given = [column.constant] if isinstance(column, ConstantColumn) else column.future
    if isinstance(column, FutureColumn) and len(given) != steps:
        raise InvalidShape(f"column {i} of the input {spec.name!r} has {len(given)} future values for {steps} steps")
    values = numbers(TensorSpec(spec.name, spec.dtype, (), True, spec.limit), given)  # raises if they do not fit
    if len(values) == 1 and isinstance(column, ConstantColumn):
        constant = values[0]
        return lambda outputs, position, step: constant
    return lambda outputs, position, step: values[step]
