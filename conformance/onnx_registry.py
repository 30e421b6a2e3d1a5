"""Caches the parsed source of PyTorch's ONNX operators: parsing takes two fifths of the time of every export."""

import copy
from functools import cache

from torch.onnx._internal.exporter._registration import ONNXRegistry

_read = cache(ONNXRegistry.from_torchlib)


def _from_torchlib(**options: int) -> ONNXRegistry:
    registry = copy.copy(_read(**options))
    registry.functions = {name: [*known] for name, known in registry.functions.items()}
    return registry


def cache_registry() -> None:
    """Parse once per process instead of once per export."""
    ONNXRegistry.from_torchlib = staticmethod(_from_torchlib)  # type: ignore[method-assign, assignment]
