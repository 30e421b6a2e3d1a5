"""A bundle's model in NumPy: a running sum. The state is the sum so far."""

import numpy as np

from unroll.bundle import Manifest, Parity, StateSlot, TensorSpec

MANIFEST = Manifest(
    format=1,
    name="sum",
    version="2",
    inputs=(TensorSpec("x", "float32", (3,), True), TensorSpec("token", "int64", (), True, limit=5)),
    outputs=(TensorSpec("y", "float32", (3,), True), TensorSpec("last", "int32", (), False)),
    state=(StateSlot("rnn", 0, 0, "forward", "h", 0, 2), StateSlot("rnn", 0, 0, "forward", "c", 2, 1)),
    state_size=3,
    initial_state=(0.1, 0.0, -1e-30),
    streamable=True,
    not_streamable_because=None,
    ragged=True,
    bit_exact=True,
    parity=tuple(Parity(name, 0.0, 1e-7, 1e-6) for name in ("y", "last", "state_out")),
    files={},
    tools={"torch": "2"},
)


def run(inputs, state, sequence_lens):
    """Run the model, as the runner does."""
    total = state[:, None] + np.cumsum(inputs["x"], axis=1, dtype=state.dtype)
    return {"y": total, "last": inputs["token"][:, -1].astype(np.int32)}, total[:, -1].copy()
