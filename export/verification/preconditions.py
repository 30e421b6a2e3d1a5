"""Checks of the user's model before lifting: module types, dtypes, copies, determinism."""

import copy
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError
from unroll.export.held_objects import held_objects, undone
from unroll.export.lifting.kept_values import kept_values
from unroll.export.lifting.module_state import Attribute, refusal
from unroll.export.loading.copies import copies_itself, detached_example
from unroll.export.signature.outputs import first_difference, leaves
from unroll.export.source_lines import source_line

#: A bundle's graph is one protobuf message, of less than 2 GiB.
_LARGEST = 2**31 - 2**24

#: Parameters of any of these become float32.
_FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def check_weights(module: nn.Module | ExportedProgram) -> None:
    """Raise ExportError(checkpoint) for a parameter without values."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ExportError(
                "checkpoint",
                f"parameter {name!r} has no values: before the export, call a module with lazy layers once, and load "
                "the weights of one on the device 'meta'",
            )


def check_modules(model: nn.Module) -> None:
    """Raise ExportError(quantized | dtype | too_large) for a module or parameter that cannot be exported."""
    for path, module in model.named_modules():
        where = f"layer {path or type(module).__name__!r}"
        if type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.quantizable")):
            raise ExportError("quantized", f"{where} is quantized; export the model as it was before quantization")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _FLOATS and not parameter.is_complex():
            raise ExportError("dtype", f"parameter {name!r} is {parameter.dtype}; export a model of float32 parameters")
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        raise ExportError("too_large", f"the parameters take {size / 2**30:.1f} GiB; a bundle holds less than 2 GiB")


def check_copy(original: nn.Module, copied: nn.Module, example: dict[str, Any]) -> None:
    """Check that copies of a copy answer like the user's module, which is called once and left as it was.

    A forward that fails, draws random numbers or counts calls is left to later checks.

    Raises:
        ExportError: not_copyable.
    """
    original = getattr(original, "_orig_mod", original)
    tried, other = copy.deepcopy(copied), copy.deepcopy(copied)
    before, answers = kept_values(tried), []
    with suppress(Exception), torch.no_grad():
        answers = [leaves(model(**detached_example(example))) for model in (tried, other)]
        if kept_values(tried) == before and all(tensor.is_cpu for tensor in original.parameters()):
            with undone(original):
                answers.append(leaves(original.eval()(**detached_example(example))))
    made = [name for name, _ in tried.named_parameters()][len([*copied.parameters()]) :]
    if made:
        raise ExportError(
            "checkpoint",
            f"forward makes parameters, as {made[-1]!r}, in its first call, with random values: make them in __init__, "
            "or call the module once before the export",
        )
    if len(answers) < 3 or not _all_close(answers[0], answers[1]) or _all_close(answers[0], answers[2]):
        return
    own = [f"{path} ({type(value).__name__})" for path, value in held_objects(original) if copies_itself(value)]
    remedy = (
        f"remove the methods with which the class of {', '.join(own)} copies its objects"
        if own
        else "keep what forward uses in attributes: not by id(self), not in a table of modules, not by requires_grad"
    )
    raise ExportError(
        "not_copyable",
        f"export works on copies of the module, and these answer differently from the module itself; {remedy}",
    )


def _all_close(one: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True)
        for (_, a), (_, b) in zip(one, other, strict=True)
    )


def precision(model: nn.Module) -> torch.dtype:
    """The common dtype of the parameters. Raises ExportError(dtype) if they have several."""
    dtypes = {parameter.dtype for parameter in model.parameters()} or {torch.float32}
    if len(dtypes) > 1:
        raise ExportError("dtype", f"the parameters have {len(dtypes)} dtypes; convert the model with model.float()")
    return dtypes.pop()


def in_its_own_precision(error: ExportError, dtype: torch.dtype) -> ExportError:
    """`error`, or advice in its place if forward fails only because it runs in float32."""
    if error.code != "forward_failed" or dtype == torch.float32:
        return error
    return ExportError(
        "forward_failed",
        f"the parameters are {dtype}, and forward fails with parameters and inputs of float32, in which a bundle "
        "computes; make forward convert to its parameters' own type, as with x.to(self.weight.dtype), or not at all"
        f"{source_line(error)}",
    )


def check_example(example: dict[str, Any], allow_nan: Collection[str]) -> None:
    """Raise ExportError(not_finite) for an input that holds NaN or infinity: a server refuses such values."""
    for name, value in example.items():
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if name in allow_nan:
            tensors = [tensor.nan_to_num(0, posinf=torch.inf, neginf=-torch.inf) for tensor in tensors]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise ExportError(
                "not_finite",
                f"input {name!r} of the example holds NaN or infinity, which a server refuses. If NaN stands for a "
                f"missing value, allow it: --allow-nan {name}, or allow_nan=[{name!r}]; or give numbers, and mark the "
                "missing ones in a separate input: torch.isnan(x).float()",
            )


def check_steady(forward: Callable[[], Any], state: list[Attribute]) -> Any:
    """Call `forward` twice and return the second result.

    Args:
        forward: calls the model on the example.
        state: the attributes that hold state.

    Raises:
        ExportError: keeps_state, if the results differ and the model keeps state; otherwise not_deterministic.
    """
    first, second = forward(), forward()
    name = first_difference(first, second)
    if name is None:
        return second
    if state:  # changed in place
        raise refusal(state)
    raise ExportError(
        "not_deterministic",
        f"two identical calls of forward differ in output {name or 'y'!r}; remove random numbers and kept state",
    )


def check_finite(named: list[tuple[str, Tensor]], allow_nan: Collection[str]) -> None:
    """Raise ExportError(not_finite) for an output that holds NaN or infinity."""
    for name, tensor in named:
        if not torch.isfinite(tensor).all():
            where = f", with NaN in {', '.join(sorted(allow_nan))}: choose what to compute with" if allow_nan else ""
            advice = f"{where} torch.where(torch.isnan(x), a, b), as NaN * 0 is NaN" if allow_nan else ""
            raise ExportError(
                "not_finite", f"output {name or 'y'!r} holds NaN or infinity on the example inputs{advice}"
            )
