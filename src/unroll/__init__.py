"""Serve stacked GRU/LSTM models trained in PyTorch.

`unroll.export(module, example, ...)` converts a module to a bundle that is proven equal to it; `unroll serve` serves
bundles; `unroll.Client(url)` talks to a server. Export needs torch, serving needs the server's packages, and a client
needs neither, so the names of this package are imported on first use.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unroll.client import AsyncClient as AsyncClient
    from unroll.client import Client as Client
    from unroll.client import errors as errors
    from unroll.export import ExportError as ExportError
    from unroll.export import Report as Report
    from unroll.export import export as export

__version__ = "0.2.0"
__all__ = ["AsyncClient", "Client", "ExportError", "Report", "__version__", "errors", "export"]
_CLIENT = {"AsyncClient", "Client", "errors"}

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is imported


def __getattr__(name: str) -> Any:
    if name == "export":
        return import_module("unroll.export")  # a callable package
    if name in __all__:
        return getattr(import_module("unroll.client" if name in _CLIENT else "unroll.export"), name)
    raise AttributeError(f"module 'unroll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
