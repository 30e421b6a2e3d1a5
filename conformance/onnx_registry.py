"""Caches what every export finds out about PyTorch's operators anew, which takes half of its time."""

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
    """Parse the source of the ONNX operators, and list those with a decomposition, once per process."""
    ONNXRegistry.from_torchlib = staticmethod(_from_torchlib)  # type: ignore[method-assign, assignment]
    for module in (exported_program, decomp_utils):
        module._collect_all_valid_cia_ops = _list  # type: ignore[attr-defined]
