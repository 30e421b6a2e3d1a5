"""What export refuses in a model as it is: kinds of modules, dtypes, and state that forward keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unroll.export.errors import ExportError
from unroll.export.lifting.module_state import Attribute, refusal
from unroll.export.signature.outputs import first_difference

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


def check_steady(forward: Callable[[], Any], state: list[Attribute]) -> Any:
    """Call `forward` twice; returns what it returned.

    Raises ExportError(not_deterministic) if the calls differ, (keeps_state) if the model keeps a `state`.
    """
    first, second = forward(), forward()
    name = first_difference(first, second)
    if name is None:
        return second
    if state:  # changed in place
        raise refusal(state)
    raise ExportError(
        "not_deterministic",
        f"two identical calls differ in output {name or 'y'!r}: forward uses random numbers or keeps a state",
    )


def check_finite(named: list[tuple[str, Tensor]]) -> None:
    for name, tensor in named:
        if not torch.isfinite(tensor).all():
            raise ExportError("not_finite", f"output {name or 'y'!r} holds NaN or infinity on the example inputs")
