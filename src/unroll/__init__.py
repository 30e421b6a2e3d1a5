"""Serve stacked GRU/LSTM models trained in PyTorch.

`unroll.export(module, example, ...)` turns a module into a bundle that is proven equal to it; `unroll serve` serves
bundles. Exporting needs torch, serving does not, so what is listed here is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unroll.export import ExportError as ExportError
    from unroll.export import Report as Report
    from unroll.export import export as export

__version__ = "0.2.0"
__all__ = ["ExportError", "Report", "__version__", "export"]


def __getattr__(name: str) -> Any:
    if name == "export":
        return import_module("unroll.export")  # a package that can be called
    if name in __all__:
        return getattr(import_module("unroll.export"), name)
    raise AttributeError(f"module 'unroll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
