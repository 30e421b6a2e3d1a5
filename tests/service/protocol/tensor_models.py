"""Manifests of fictitious models, and arrays for their inputs and outputs."""

from typing import get_args

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unroll.bundle import Manifest, TensorSpec
from unroll.bundle.manifest import Dtype, Parity, StateSlot

NAMES = st.lists(st.from_regex(r"[a-z][a-z_0-9]{0,5}", fullmatch=True), min_size=2, max_size=5, unique=True)
SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def manifest(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Manifest:
    return Manifest(
        format=1,
        name="m",
        version="1",
        inputs=inputs,
        outputs=outputs,
        state=(StateSlot("rnn", 0, 0, "forward", "h", 0, 4),),
        state_size=4,
        initial_state=None,
        streamable=True,
        not_streamable_because=None,
        ragged=True,
        bit_exact=True,
        parity=tuple(Parity(name, 0.0, 0.0, 1e-6) for name in (*(spec.name for spec in outputs), "state_out")),
        files={"model.onnx": "00" * 32},
        tools={},
    )


@st.composite
def manifests(draw: st.DrawFn, *, most_inputs: int = 2, most_outputs: int = 2) -> Manifest:
    names = draw(NAMES)
    split = draw(st.integers(1, len(names) - 1))

    def spec(name: str, time: bool) -> TensorSpec:
        dtype: Dtype = draw(st.sampled_from(get_args(Dtype)))
        limit = draw(st.none() | st.integers(1, 1000)) if time and dtype.startswith("int") else None
        return TensorSpec(name, dtype, draw(SHAPES), time, limit)

    inputs = tuple(spec(name, True) for name in names[:split][:most_inputs])
    outputs = tuple(spec(name, draw(st.booleans())) for name in names[split:][:most_outputs])
    return manifest(inputs, outputs)


def arrays(spec: TensorSpec, *lead: int) -> st.SearchStrategy[np.ndarray]:
    """Arrays (*lead, *spec.shape) of arbitrary valid values."""
    match spec.dtype:
        case "float32":
            values: st.SearchStrategy = st.floats(width=32, allow_nan=False, allow_infinity=False)
        case "bool":
            values = st.booleans()
        case _ if spec.limit is not None:
            values = st.integers(0, spec.limit - 1)
        case _:
            bounds = np.iinfo(spec.dtype)
            values = st.integers(int(bounds.min), int(bounds.max))
    return hnp.arrays(spec.numpy, (*lead, *spec.shape), elements=values)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
