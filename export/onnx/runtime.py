"""Runs a graph on onnxruntime, as the bundle's run function."""

from typing import Any

import onnxruntime

from unroll.bundle import CRASHING_OPTIMIZERS
from unroll.bundle.golden import Arrays, RunFunction
from unroll.export.errors import ExportError, first_line
from unroll.export.lifting.streaming import StreamingModule


def onnx_runner(model: bytes, module: StreamingModule) -> RunFunction:
    """Wrap a graph on onnxruntime's CPU provider as a run function, which raises ExportError(parity)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=CRASHING_OPTIMIZERS
        )
    except Exception as error:
        advice = ""
        if "NOT_IMPLEMENTED" in str(error):
            advice = "; if forward computes in bfloat16 or float16, as with torch.autocast, compute in float32"
        raise ExportError(
            "not_exportable", f"onnxruntime cannot load the graph: {first_line(error)}{advice}"
        ) from error
    names = [output.spec.name for output in module.outputs]

    def run(inputs: Arrays, state: Any, sequence_lens: Any) -> tuple[Arrays, Any]:
        feeds = inputs | {"state": state, "sequence_lens": sequence_lens}
        try:
            *outputs, after = session.run([*names, "state_out"], feeds)
        except Exception as error:
            size = f"{len(state)} sequences of {max(sequence_lens)} time steps"
            raise ExportError(
                "parity", f"onnxruntime fails on {size}, PyTorch does not: {first_line(error)}"
            ) from error
        return dict(zip(names, outputs, strict=True)), after

    return run
