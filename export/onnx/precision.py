"""Reduces a graph's precision: float16 for GPUs, integers for the CPU. Inputs, outputs and state row stay float32."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from unroll.bundle.graph import operators
from unroll.bundle.manifest import Precision
from unroll.export.errors import ExportError
from unroll.export.log_filter import quiet

#: The operators that onnxruntime can run on integers on the CPU; not GRU and RNN, and an embedding gains nothing.
_INTEGER = ["LSTM", "MatMul"]


def reduced_graph(graph: onnx.ModelProto, precision: Precision) -> bytes:
    """The bytes of `graph` in `precision`. Raises ExportError(precision)."""
    return _CONVERT[precision](graph)


def _float16(graph: onnx.ModelProto) -> bytes:
    with quiet():
        return convert_float_to_float16(copy.deepcopy(graph), keep_io_types=True).SerializeToString()


def _int8(graph: onnx.ModelProto) -> bytes:
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        # 7-bit weights: on processors without VNNI, the 16-bit sum of two 8-bit products would saturate.
        quantize_dynamic(
            copy.deepcopy(graph),
            path,
            op_types_to_quantize=_INTEGER,
            weight_type=QuantType.QUInt8,
            reduce_range=True,
        )
        content = path.read_bytes()
    if not any("Quantize" in name or "Integer" in name for name in operators(content)):
        found = ", ".join(operators(graph.SerializeToString()))
        raise ExportError(
            "precision", f"int8: onnxruntime computes LSTM and MatMul in integers, and the model has neither ({found})"
        )
    return content


_CONVERT: dict[str, Callable[[onnx.ModelProto], bytes]] = {"float16": _float16, "int8": _int8}
