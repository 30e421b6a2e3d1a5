"""The bundle: the contract between `export`, which writes it, and `service`, which serves it.

A bundle is a folder `<repository>/<name>/<version>/` with `model.onnx`, `manifest.json` and `golden.safetensors`. This
package needs NumPy, but neither torch nor onnxruntime.
"""

from unroll.bundle.errors import BundleError
from unroll.bundle.files import (
    Bundle,
    Content,
    check_digests,
    discover,
    parse,
    read,
    read_content,
    stated_digest,
    write,
)
from unroll.bundle.golden import Golden, RunFunction
from unroll.bundle.manifest import CRASHING_OPTIMIZERS, Manifest, Parity, Precision, StateSlot, StaticInput, TensorSpec
from unroll.bundle.verification import GoldenMismatch, Verifier

__all__ = [
    "CRASHING_OPTIMIZERS",
    "Bundle",
    "BundleError",
    "Content",
    "Golden",
    "GoldenMismatch",
    "Manifest",
    "Parity",
    "Precision",
    "RunFunction",
    "StateSlot",
    "StaticInput",
    "TensorSpec",
    "Verifier",
    "check_digests",
    "discover",
    "parse",
    "read",
    "read_content",
    "stated_digest",
    "write",
]
