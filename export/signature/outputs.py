"""The result of forward: its tensors, their names, and their batch and time axes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from unroll.bundle import TensorSpec
from unroll.bundle.manifest import Dtype
from unroll.export.errors import COMPLEX, ExportError

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


@dataclass(frozen=True, slots=True)
class Output:
    """The `index`-th tensor that forward returns, with its batch and time axes; `time` is None if it has no time."""

    index: int
    spec: TensorSpec
    batch: int
    time: int | None

    def batch_major(self, tensor: Tensor) -> Tensor:
        """Transpose to the bundle's layout: (batch, time, ...) or (batch, ...)."""
        axes = [self.batch] if self.time is None else [self.batch, self.time]
        order = axes + [axis for axis in range(tensor.dim()) if axis not in axes]
        return tensor if order == sorted(order) else tensor.permute(order)


def leaves(returned: Any) -> list[tuple[str, Tensor]]:
    """The tensors in the result of forward, with names built from dict keys, field names and positions."""
    return _walk(returned, "")


def is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _walk(value: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not is_plain(value):
            raise ExportError(
                "output", "forward returns a sparse or nested tensor; return a padded one, as with y.to_dense()"
            )
        return [(path, value)]
    if value is None:
        return []
    if isinstance(value, PackedSequence):
        return [(path, pad_packed_sequence(value, batch_first=True)[0])]
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(f"y{index}" if not path else str(index), item) for index, item in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(item.name, getattr(value, item.name)) for item in fields(value)]
    else:
        raise ExportError(
            "output", f"forward returns a {type(value).__name__}; return tensors, tuples or dicts of them"
        )
    return [leaf for key, item in items for leaf in _walk(item, f"{path}_{key}" if path else key)]


def indices_of(named: list[tuple[str, Tensor]], output: str) -> list[int]:
    """The indices of the tensors in the output of that name."""
    exact = [index for index, (name, _) in enumerate(named) if name == output]
    return exact or [index for index, (name, _) in enumerate(named) if name.startswith(output + "_")]


def continuing(named: list[tuple[str, Tensor]], output: str, state: Any) -> list[int]:
    """The index of the tensor that continues each tensor of `state`, matched by key, or else by position."""
    found = indices_of(named, output)
    by_key = {named[index][0].removeprefix(f"{output}_"): index for index in found}
    keys = [key for key, _ in leaves(state)]
    return [by_key[key] for key in keys] if by_key.keys() == set(keys) else found


def is_same(one: Tensor | None, other: Tensor) -> bool:
    """Are shape and all values equal? NaN equals NaN."""
    return one is not None and one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def first_difference(one: Any, other: Any) -> str | None:
    """The name of the first tensor that differs between two results of forward, or None.

    Raises:
        ValueError: if they hold different numbers of tensors.
    """
    pairs = zip(leaves(one), leaves(other), strict=True)
    return next((name for (name, a), (_, b) in pairs if not is_same(a, b)), None)


def plan_outputs(
    frames: dict[tuple[int, int], list[tuple[str, Tensor]]], dropped: set[int], given_names: list[str] | None
) -> tuple[Output, ...]:
    """Find the axes of every output from its shapes in several calls.

    Args:
        frames: the result of forward by (batch, time); the first one is the base.
        dropped: indices of tensors that are not outputs.
        given_names: names for the outputs, or None.

    Raises:
        ExportError: output, for an output that is neither (batch, time, ...) nor (batch, ...) in any order of axes.
    """
    (batch, time), *others = frames
    other_batch = next(size for size in others if size[1] == time)
    other_time = next(size for size in others if size[0] == batch)
    base = frames[batch, time]
    kept = [index for index in range(len(base)) if index not in dropped]
    names = [base[index][0] for index in kept]
    if len(kept) == 1 and names[0] in {"", "y0"}:
        names = ["y"]
    if given_names is not None:
        if len(given_names) != len(kept):
            raise ExportError("output", f"{len(given_names)} output names for {len(kept)} outputs ({', '.join(names)})")
        names = given_names
    if not kept:
        raise ExportError("output", "forward returns only its states: also return the output for the client")

    outputs = []
    for index, name in zip(kept, names, strict=True):
        tensor = base[index][1]
        by_batch = _changed(tensor, frames[other_batch][index][1], name)
        by_time = _changed(tensor, frames[other_time][index][1], name)
        if len(by_batch) != 1 or tensor.shape[by_batch[0]] != batch:
            raise ExportError(
                "output", f"output {name!r} is {tuple(tensor.shape)} for a batch of {batch}: it needs one batch axis"
            )
        if len(by_time) > 1 or (by_time and (tensor.shape[by_time[0]] != time or by_time == by_batch)):
            raise ExportError(
                "output",
                f"output {name!r} is {tuple(tensor.shape)} for {time} time steps: its time axis must have the "
                "input's length, and there may be only one",
            )
        if not tensor.numel():
            raise ExportError(
                "output", f"output {name!r} is {tuple(tensor.shape)}, which holds no values; leave it out"
            )
        if tensor.dtype not in DTYPES:
            raise ExportError("dtype", f"output {name!r} is {tensor.dtype}; {_other_type(tensor)}")
        time_axis = by_time[0] if by_time else None
        shape = tuple(size for axis, size in enumerate(tensor.shape) if axis not in {by_batch[0], time_axis})
        spec = TensorSpec(name, DTYPES[tensor.dtype], shape, time_axis is not None)
        outputs.append(Output(index, spec, by_batch[0], time_axis))
    return tuple(outputs)


def _other_type(tensor: Tensor) -> str:
    if tensor.is_complex():
        return COMPLEX
    if tensor.dtype == torch.float64:
        return (
            "return y.float(). If forward caches tensors outside of the module, in a global or with lru_cache, keep "
            "them in the module: export also runs it in float64"
        )
    change = "float" if tensor.is_floating_point() else "int"
    return f"return y.{change}(): a bundle has float32, int64, int32 and bool"


def _changed(one: Tensor, other: Tensor, name: str) -> list[int]:
    if one.dim() != other.dim():
        raise ExportError(
            "output",
            f"output {name!r} has {one.dim()} dimensions or {other.dim()}, depending on the input; fix the number",
        )
    return [axis for axis in range(one.dim()) if one.shape[axis] != other.shape[axis]]
