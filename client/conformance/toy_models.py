"""Toy models: each output reveals the previous steps and their order.

The state is one number: state' = 0.5 state + x0 + 10 x1 + 100 x2 + ..., where x0, x1, ... are the values of all inputs
of a time step. The outputs are the new state, and numbers derived from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unroll.client.conformance.refusals import Refusal
from unroll.client.tensors import Tensor, named

_FLOAT = "float32"


def bytes_of(spec: Tensor, steps: int) -> int:
    return spec.size * spec.numpy.itemsize * (steps if spec.time else 1)


@dataclass(frozen=True)
class ToyModel:
    """A toy model; its digest has 64 hexadecimal digits."""

    name: str
    digest: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    static: tuple[Tensor, ...] = ()
    version: str = "1"

    def description(self) -> dict[str, Any]:
        """The document of `GET /v1/models/{name}`."""

        def tensors(group: Sequence[Tensor]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "time": t.time} for t in group]

        static = [{name: value for name, value in item.items() if name != "time"} for item in tensors(self.static)]
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "state_size": 1,
            "sessions": 0,
            "inputs": tensors(self.inputs),
            "outputs": tensors(self.outputs),
            "static": static,
            "streamable": True,
            "not_streamable_because": None,
            "bit_exact": True,
            "stability": 0.0,
            "device": "cpu",
            "provider": "toy",
            "precision": _FLOAT,
            "parity": {},
        }

    def first_state(self, static: Mapping[str, Any] | None) -> float:
        """The initial state. Raises Refusal if the static inputs do not fit the model."""
        given = dict(static or {})
        if set(given) != {spec.name for spec in self.static}:
            raise Refusal("invalid_shape", f"{self.name!r} takes the static inputs {[s.name for s in self.static]}")
        return float(sum(np.sum(given[spec.name]) for spec in self.static))

    def states(self, state: float, inputs: Sequence[np.ndarray]) -> list[float]:
        """The state after each of T time steps, with inputs (T, *shape)."""
        columns = [column for array in inputs for column in array.reshape(len(array), -1).T.astype(np.float64)]
        drives = sum(10.0**index * column for index, column in enumerate(columns))
        states = []
        for drive in np.asarray(drives).tolist():
            state = float(np.float32(0.5 * state + drive))
            states.append(state)
        return states

    def outputs_of(self, states: Sequence[float], begin: int) -> list[np.ndarray]:
        """The outputs of the steps that led to these states, the first at position `begin`."""
        made = {
            "y": np.array(states)[:, np.newaxis],
            "count": np.arange(begin + 1, begin + 1 + len(states)),
            "last": np.array([states[-1], -states[-1]]),
        }
        return [made[spec.name].astype(spec.numpy) for spec in self.outputs]

    def inputs_of_raw(self, content: bytes | memoryview, steps: int) -> list[np.ndarray]:
        """Decode raw inputs. Raises Refusal."""
        needed = sum(bytes_of(spec, steps) for spec in self.inputs)
        if len(content) != needed:
            raise Refusal("invalid_shape", f"{steps} steps have {needed} bytes, not {len(content)}")
        arrays, begin = [], 0
        for spec in self.inputs:
            end = begin + bytes_of(spec, steps)
            arrays.append(np.frombuffer(content[begin:end], spec.numpy).reshape(steps, *spec.shape))
            begin = end
        return _finite(arrays)

    def inputs_of_json(self, values: Any) -> list[np.ndarray]:
        """Convert JSON inputs, [step, ...] or {input: [step, ...]}. Raises Refusal."""
        named = values if isinstance(values, dict) else {self.inputs[0].name: values}
        try:
            arrays = [np.array(named[spec.name], spec.numpy) for spec in self.inputs]
        except (KeyError, ValueError, TypeError) as error:
            raise Refusal("invalid_shape", f"the inputs are not those of {self.name!r}: {error}") from error
        for spec, array in zip(self.inputs, arrays, strict=True):
            if array.ndim == 0 or array.shape != (len(arrays[0]), *spec.shape) or not len(array):
                raise Refusal("invalid_shape", f"{spec.name!r} has the shape {array.shape}")
        return _finite(arrays)

    def last_of(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs of the last time step."""
        return [array[-1] if spec.time else array for spec, array in zip(self.outputs, outputs, strict=True)]

    def last_outputs_of_json(self, values: Any) -> list[np.ndarray]:
        """Convert the outputs of one time step, the inverse of `json_of`. Raises Refusal."""
        named = values if len(self.outputs) > 1 else {self.outputs[0].name: values}
        try:
            return [np.array(named[spec.name], spec.numpy).reshape(spec.shape) for spec in self.outputs]
        except (KeyError, ValueError, TypeError) as error:
            raise Refusal("invalid_shape", f"the outputs are not those of {self.name!r}: {error}") from error

    def json_of(self, outputs: Sequence[np.ndarray]) -> Any:
        return json_of(self.outputs, outputs)


def json_of(specs: Sequence[Tensor], arrays: Sequence[np.ndarray]) -> Any:
    """A single value, or {name: value} for several tensors."""
    return named(specs, [array.tolist() for array in arrays])


def _finite(arrays: list[np.ndarray]) -> list[np.ndarray]:
    if not all(np.isfinite(array).all() for array in arrays):
        raise Refusal("non_finite_input", "the inputs contain NaN or infinity")
    return arrays


_X, _Y = Tensor("x", _FLOAT, (2,)), Tensor("y", _FLOAT, (1,))

MODELS = {
    model.name: model
    for model in (
        ToyModel("toy", "70" * 32, (_X,), (_Y,)),
        ToyModel(
            "tensors",
            "71" * 32,
            (_X, Tensor("k", "int64", ()), Tensor("b", "bool", (2,))),
            (_Y, Tensor("count", "int64", ()), Tensor("last", _FLOAT, (2,), time=False)),
        ),
        ToyModel("static", "72" * 32, (_X,), (_Y,), (Tensor("offset", _FLOAT, (2,)),)),
    )
}
