"""A trained PyTorch model in, a bundle out that is proven equal to it. Only this package needs torch and onnx.

The package and its function have one name: `unroll.export(...)` calls the function, whether the package was
imported before or not.
"""

import inspect
import sys
from types import ModuleType

from unroll.export.errors import ExportError
from unroll.export.exporter import export
from unroll.export.report import Report

__all__ = ["ExportError", "Report", "export"]


class _Callable(ModuleType):
    __call__ = staticmethod(export)
    __signature__ = inspect.signature(export)


sys.modules[__name__].__class__ = _Callable
