"""PyTorch parses the source of each of its ONNX operators at every export, for two fifths of the time that it takes."""

import copy
from functools import cache

from torch.onnx._internal.exporter._registration import ONNXRegistry

_read = cache(ONNXRegistry.from_torchlib)


def _from_torchlib(**options: int) -> ONNXRegistry:
    registry = copy.copy(_read(**options))
    registry.functions = {name: [*known] for name, known in registry.functions.items()}
    return registry


def read_once() -> None:
    """From now on in this process, once for all exports."""
    ONNXRegistry.from_torchlib = staticmethod(_from_torchlib)  # type: ignore[method-assign, assignment]
