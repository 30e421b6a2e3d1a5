"""Exports a trained PyTorch model to a bundle that is proven equal to it. Only this package needs torch and onnx.

The package and its function share a name: `unroll.export(...)` calls the function, whether or not the package was
imported before. The function is imported on first use, so that `unroll export --help` does not wait for torch.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unroll.export.errors import ExportError as ExportError
    from unroll.export.exporter import export as export
    from unroll.export.report import Report as Report

__all__ = ["ExportError", "Report", "export"]
_HOMES = {"ExportError": "errors", "Report": "report", "export": "exporter"}


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.export(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.export)


sys.modules[__name__].__class__ = _Callable


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
