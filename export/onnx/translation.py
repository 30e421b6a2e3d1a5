"""Translates to ONNX nodes: our custom ops, one LSTM, GRU or RNN per layer, and operators that PyTorch's own
translation rounds more, or computes differently."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx_ir import DataType
from onnxscript import opset20 as op


def translation_table() -> dict[Callable, Callable]:
    """The function that writes the nodes of each custom op."""
    return {
        torch.ops.unroll.lstm.default: _lstm,
        torch.ops.unroll.gru.default: _gru,
        torch.ops.unroll.rnn.default: _rnn,
        torch.ops.unroll.cat.default: _cat,
        torch.ops.aten.mean.dim: _mean,
        torch.ops.aten.sum.dim_IntList: _sum,
        torch.ops.aten.atan2.default: _atan2,
        torch.ops.aten.signbit.default: _signbit,
        torch.ops.aten.where.self: _where,
        torch.ops.aten.copysign.Tensor: _copysign,
        torch.ops.aten.logaddexp.default: _logaddexp,
        torch.ops.aten.log_sigmoid_forward.default: lambda x: (_log_sigmoid(x), x),
        torch.ops.aten.log_sigmoid.default: _log_sigmoid,
    }


def _lstm(x: Any, lens: Any, h: Any, c: Any, w: Any, r: Any, b: Any) -> Any:
    y, h_out, c_out = op.LSTM(x, w, r, b, lens, h, c, **_shape_of(h))
    return _joined(y, h), h_out, c_out


def _gru(x: Any, lens: Any, h: Any, w: Any, r: Any, b: Any) -> Any:
    # linear_before_reset=1 is torch's (and cuDNN's) GRU; ONNX's default is another function.
    y, h_out = op.GRU(x, w, r, b, lens, h, **_shape_of(h), linear_before_reset=1)
    return _joined(y, h), h_out


def _rnn(x: Any, lens: Any, h: Any, w: Any, r: Any, b: Any, activation: str) -> Any:
    # onnxruntime's RNN, unlike its LSTM and GRU, rounds a batch of one differently from a larger one. Duplicating the
    # first row avoids a batch of one, so a row's bits do not depend on the rest of the batch.
    x, lens, rows = _first_twice(x, 1), _first_twice(lens, 0), _first_twice(h, 1)
    y, h_out = op.RNN(x, w, r, b, lens, rows, **_shape_of(h), activations=[activation] * h.shape[0])
    return _joined(_without_last(y, 2), h), _without_last(h_out, 1)


def _cat(tensors: Any, axis: int) -> Any:
    return op.Concat(*tensors, axis=axis)


def _mean(x: Any, dim: Sequence[int], keepdim: bool = False, dtype: int = -1) -> Any:
    return _reduced(op.ReduceMean, x, dim, keepdim)


def _sum(x: Any, dim: Sequence[int], keepdim: bool = False, dtype: int = -1) -> Any:
    return _reduced(op.ReduceSum, x, dim, keepdim)


def _atan2(y: Any, x: Any) -> Any:
    """PyTorch's translation takes a negative zero for a positive one in one argument, and not in the other."""
    numbers: tuple[Any, ...] = (op.Constant(value_float=0.0), op.Constant(value_float=math.pi))
    zero, pi = (op.CastLike(number, x) for number in numbers)
    at_zero = op.And(op.Equal(x, zero), op.Equal(y, zero))
    angle = op.Where(at_zero, zero, op.Atan(op.Div(op.Abs(y), op.Abs(x))))
    angle = op.Where(_is_negative(x, zero), op.Sub(pi, angle), angle)
    return op.Where(_is_negative(y, zero), op.Neg(angle), angle)


def _signbit(x: Any) -> Any:
    """PyTorch's translation takes a negative zero for a positive one."""
    number: Any = op.Constant(value_float=0.0)
    zero = op.CastLike(number, x)
    return _is_negative(x, zero) if x.dtype.is_floating_point() else op.Less(x, zero)


def _where(condition: Any, x: Any, y: Any) -> Any:
    """onnxruntime has no Where of bools."""
    if x.dtype != DataType.BOOL:
        return op.Where(condition, x, y)
    return op.Or(op.And(condition, x), op.And(op.Not(condition), y))


def _log_sigmoid(x: Any) -> Any:
    """PyTorch's translation is -inf below -18."""
    return op.Neg(op.Softplus(op.Neg(x)))


def _logaddexp(x: Any, y: Any) -> Any:
    """PyTorch's translation is infinite above 88, and -inf below -104."""
    return op.Add(op.Max(x, y), op.Softplus(op.Neg(op.Abs(op.Sub(x, y)))))


def _copysign(x: Any, y: Any) -> Any:
    size = op.Abs(x)
    return op.Where(_signbit(y), op.Neg(size), size)


def _is_negative(x: Any, zero: Any) -> Any:
    return op.Or(op.Less(x, zero), op.Less(op.Reciprocal(x), zero))


def _reduced(reduce: Callable, x: Any, dim: Sequence[int], keepdim: bool) -> Any:
    """Reduce over time in float64: onnxruntime adds sequentially, PyTorch in a tree, which rounds less."""
    axes = sorted({axis % len(x.shape) for axis in dim or range(len(x.shape))})
    if x.dtype != DataType.FLOAT or all(isinstance(x.shape[axis], int) for axis in axes):
        return reduce(x, _ints(*axes), keepdims=int(keepdim))
    exact = op.Cast(x, to=DataType.DOUBLE)
    return op.Cast(reduce(exact, _ints(*axes), keepdims=int(keepdim)), to=DataType.FLOAT)


def _first_twice(tensor: Any, axis: int) -> Any:
    return op.Concat(tensor, op.Slice(tensor, _ints(0), _ints(1), _ints(axis)), axis=axis)


def _without_last(tensor: Any, axis: int) -> Any:
    return op.Slice(tensor, _ints(0), _ints(-1), _ints(axis))


def _shape_of(h: Any) -> dict[str, Any]:
    return {"hidden_size": h.shape[2], "direction": "bidirectional" if h.shape[0] == 2 else "forward"}


def _joined(y: Any, h: Any) -> Any:
    """(time, directions, batch, hidden) -> (time, batch, directions * hidden)."""
    if h.shape[0] == 1:
        return op.Squeeze(y, _ints(1))
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), _ints(0, 0, -1))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))
