"""Detects whether a module has random weights, by making it twice."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def random_tensors(module: nn.Module, other: nn.Module) -> list[str]:
    """The names of parameters, buffers and other tensors that differ between two modules made by the same code."""
    if module is other:
        return []
    theirs = dict(_tensors(other))
    return [name for name, tensor in _tensors(module) if not _is_same(tensor, theirs.get(name))]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
    for path, inner in module.named_modules():
        yield from ((f"{path}.{name}".lstrip("."), value) for name, value in vars(inner).items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_leaf


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or is_lazy(one) or is_lazy(other) or one.shape != other.shape:
        return False
    return torch.allclose(one, other, 0, 0, equal_nan=True) if one.dtype == other.dtype else False


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch at the end."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def other_random_numbers() -> Iterator[None]:
    """Use different random numbers."""
    with random_states_kept():
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(2_718_281_828)
        yield
