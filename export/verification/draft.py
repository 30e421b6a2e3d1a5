"""The draft manifest of a model, before anything about it is proven."""

import numpy as np
import onnx
import onnxruntime
import torch

from unroll import __version__
from unroll.bundle import Manifest, StaticInput, TensorSpec
from unroll.export.lifting.lifted_model import LiftedModel
from unroll.export.onnx.graph import OPSET
from unroll.export.signature.outputs import DTYPES


def draft_manifest(name: str, version: str, lifted: LiftedModel, initial_row: np.ndarray) -> Manifest:
    """Build the manifest without proven properties; the model is marked as not streamable.

    Args:
        initial_row: (state_size,) float32, the initial state of every sequence.
    """
    single, samples = lifted.single, lifted.samples
    inputs = tuple(
        TensorSpec(
            key,
            DTYPES[torch.from_numpy(array).dtype],
            array.shape[2:],
            True,
            samples.limits.get(key),
            nan=bool(np.isnan(array).any()),
        )
        for key, array in samples.example.items()
    )
    offsets = {slot.module: slot.offset for slot in single.layout.slots if slot.kind == "static"}
    static = tuple(
        StaticInput(key, DTYPES[value.dtype], tuple(value.shape[1:]), offsets[f"input {key}"], samples.limits.get(key))
        for key, value in single.arguments.static.items()
    )
    return Manifest(
        format=1,
        name=name,
        version=version,
        inputs=inputs,
        outputs=tuple(output.spec for output in single.outputs),
        state=single.layout.slots,
        state_size=single.layout.size,
        initial_state=tuple(initial_row.tolist()) if initial_row.any() else None,
        streamable=False,
        not_streamable_because="not tried",
        ragged=False,
        bit_exact=False,
        parity=(),
        files={},
        tools={
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "unroll": __version__,
            "opset": str(OPSET),
        },
        static=static,
    )
