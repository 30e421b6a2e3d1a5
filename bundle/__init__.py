"""The bundle: the contract between `export`, which writes it, and `service`, which serves it.

A bundle is the folder `<repository>/<name>/<version>/` with `model.onnx`, `manifest.json` and
`golden.safetensors`. This package knows files and NumPy; it knows neither torch nor onnxruntime.
"""

from unroll.bundle.files import Bundle, BundleError, discover, read, write
from unroll.bundle.golden import Golden, GoldenMismatch, RunFunction, replay
from unroll.bundle.manifest import CRASHING_OPTIMIZERS, Manifest, Parity, Precision, StateSlot, StaticInput, TensorSpec

__all__ = [
    "CRASHING_OPTIMIZERS",
    "Bundle",
    "BundleError",
    "Golden",
    "GoldenMismatch",
    "Manifest",
    "Parity",
    "Precision",
    "RunFunction",
    "StateSlot",
    "StaticInput",
    "TensorSpec",
    "discover",
    "read",
    "replay",
    "write",
]
