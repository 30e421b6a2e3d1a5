"""Finds the layer at which a run in chunks first differs from the run of the whole sequence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unroll.bundle.golden import Arrays
from unroll.export.lifting.dataflow import hooked
from unroll.export.lifting.streaming import StreamingModule, torch_runner

#: Each leaf module that ran, in order: its path, its input tensors and its output tensors.
Trace = list[tuple[str, list[Tensor], list[Tensor]]]


def find_divergence(module: StreamingModule, inputs: Arrays, rows: np.ndarray, chunks: Sequence[int]) -> str:
    """Describe where the runs diverge: `at layer 'conv' (Conv1d)`, or between two layers.

    Args:
        module: the lifted model in float64.
    """
    whole = _trace(module, inputs, rows, [sum(chunks)])[0]
    pieces = _trace(module, inputs, rows, chunks)
    if any([path for path, _, _ in piece] != [path for path, _, _ in whole] for piece in pieces):
        return "it runs different layers for a shorter sequence"
    last = ""
    for index, (path, received, gave) in enumerate(whole):
        name = f"layer {path!r} ({type(module.model.get_submodule(path)).__name__})"
        if not _joins(received, [piece[index][1] for piece in pieces], chunks):
            return f"before {name}" if not last else f"between {last} and {name}"
        if not _joins(gave, [piece[index][2] for piece in pieces], chunks):
            return f"at {name}"
        last = name
    return f"after {last}" if last else "in forward itself"


def _trace(module: StreamingModule, inputs: Arrays, rows: np.ndarray, chunks: Sequence[int]) -> list[Trace]:
    """One trace per chunk; each chunk starts from the state of the previous one."""
    trace: Trace = []

    def hook(path: str) -> Any:
        return lambda _, args, output: trace.append((path, _tensors(args[:1]), _tensors(output)[:1]))

    leaves = [(path, leaf) for path, leaf in module.model.named_modules() if path and not any(leaf.children())]
    run = torch_runner(module, double=True)
    traces, start, state = [], 0, rows.astype(np.float64)
    with hooked([leaf.register_forward_hook(hook(path)) for path, leaf in leaves]):
        for length in chunks:
            piece = {name: array[:, start : start + length] for name, array in inputs.items()}
            _, state = run(piece, state, np.full(len(state), length, np.int32))
            traces.append(list(trace))
            trace.clear()
            start += length
    return traces


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _joins(whole: list[Tensor], pieces: list[list[Tensor]], chunks: Sequence[int]) -> bool:
    """Do the pieces equal the whole when concatenated along an axis that follows the chunk lengths?"""
    for position, tensor in enumerate(whole):
        parts = [piece[position] for piece in pieces]
        axes = [
            axis
            for axis in range(tensor.dim())
            if tensor.shape[axis] == sum(chunks)
            and all(part.dim() == tensor.dim() and part.shape[axis] == n for part, n in zip(parts, chunks, strict=True))
        ]
        joined = [torch.cat(parts, axis) for axis in axes] or [parts[-1]]
        if not any(j.shape == tensor.shape and torch.allclose(j, tensor, 1e-9, 1e-9) for j in joined):
            return False
    return True
