"""What onnxruntime was built with, for `unroll doctor`: beside the runner the only file that imports it."""

from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort


@dataclass(frozen=True, slots=True)
class Build:
    """cuda: the CUDA version it was built for, or empty. folder: of its shared libraries."""

    version: str
    cuda: str
    providers: tuple[str, ...]
    folder: Path


def build() -> Build:
    return Build(
        ort.__version__,
        getattr(ort, "cuda_version", ""),
        tuple(ort.get_available_providers()),
        Path(ort.__file__).parent / "capi",
    )


def load_cuda_libraries() -> None:
    """From where the runner has them loaded, before a session on CUDA. What is missing is printed, not raised."""
    ort.preload_dlls()
