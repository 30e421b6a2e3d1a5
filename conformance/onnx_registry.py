"""Caches information about PyTorch's operators that every export would otherwise recompute in half of its time."""

import copy
from functools import cache

from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

_read = cache(ONNXRegistry.from_torchlib)
_list = cache(exported_program._collect_all_valid_cia_ops)  # type: ignore[attr-defined]


def _from_torchlib(**options: int) -> ONNXRegistry:
    registry = copy.copy(_read(**options))
    registry.functions = {name: [*known] for name, known in registry.functions.items()}
    return registry


def cache_registry() -> None:
    """Parse the sources of ONNX operators, and list operators with a decomposition, only once per process."""
    ONNXRegistry.from_torchlib = staticmethod(_from_torchlib)  # type: ignore[method-assign, assignment]
    for module in (exported_program, decomp_utils):
        module._collect_all_valid_cia_ops = _list  # type: ignore[attr-defined]
