"""A trained PyTorch model in, a bundle out that is proven equal to it. Only this package needs torch and onnx."""

from export.errors import ExportError
from export.exporter import export
from export.report import Report

__all__ = ["ExportError", "Report", "export"]
