"""What export refuses in a model as it is: kinds of modules, dtypes, and state that forward keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.outputs import leaves

#: A bundle's graph is one protobuf message, of less than 2 GiB.
_LARGEST = 2**31 - 2**24

#: Parameters of any of these become float32.
_FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def check_modules(model: nn.Module) -> None:
    """Raises ExportError for a module or parameter that cannot be exported faithfully, naming it."""
    for path, module in model.named_modules():
        where = f"layer {path or type(module).__name__!r}"
        if type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.quantizable")):
            raise ExportError("quantized", f"{where} is quantized; export the float model")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _FLOATS:
            raise ExportError("dtype", f"parameter {name!r} is {parameter.dtype}; export a float32 model")
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        raise ExportError("too_large", f"the parameters take {size / 2**30:.1f} GiB; a bundle holds less than 2 GiB")


def precision(model: nn.Module) -> torch.dtype:
    """What the parameters are, all of them. Raises ExportError(dtype) if they differ."""
    dtypes = {parameter.dtype for parameter in model.parameters()} or {torch.float32}
    if len(dtypes) > 1:
        raise ExportError(
            "dtype", f"the parameters are of {len(dtypes)} dtypes; export a float32 model (model.float())"
        )
    return dtypes.pop()


def check_steady(model: nn.Module, forward: Callable[[], Any]) -> Any:
    """Call `forward` three times; returns what it returned.

    Raises ExportError(keeps_state) if a call changes a buffer or a tensor attribute once they are warm, or
    (not_deterministic) if two calls differ: a service would mix the clients that share such a module.
    """
    forward()
    before = _tensors(model)
    first = forward()
    changed = [
        path for path, tensor in _tensors(model).items() if path not in before or not _same(before[path], tensor)
    ]
    if changed:
        raise ExportError(
            "keeps_state",
            f"forward changes {', '.join(map(repr, changed))}: state kept in the module is shared by all clients; "
            "return it, or leave it to the recurrent layer",
        )
    second = forward()
    for (name, one), (_, other) in zip(leaves(first), leaves(second), strict=True):
        if not _same(one, other):
            raise ExportError(
                "not_deterministic",
                f"two identical calls differ in output {name or 'y'!r}: forward uses random numbers or keeps a state",
            )
    return second


def check_finite(named: list[tuple[str, Tensor]]) -> None:
    for name, tensor in named:
        if not torch.isfinite(tensor).all():
            raise ExportError("not_finite", f"output {name or 'y'!r} holds NaN or infinity on the example inputs")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every buffer and plain tensor attribute, also inside a tuple, list or dict attribute, by path."""
    found: dict[str, Tensor] = {path: buffer.clone() for path, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in vars(nn.Module()):
                continue
            if name in {"_flat_weights", "_flat_weight_refs"}:
                continue
            for key, tensor in leaves_or_nothing(value):
                found[".".join(filter(None, (path, name, key)))] = tensor.detach().clone()
    return found


def leaves_or_nothing(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in an attribute; nothing if it holds anything else."""
    try:
        return leaves(value)
    except ExportError:
        return []


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
