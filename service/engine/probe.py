"""Properties of the installed onnxruntime, for `unroll doctor`."""

from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort


@dataclass(frozen=True, slots=True)
class Build:
    """The installed onnxruntime. cuda: The CUDA version it was built for; empty if none."""

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
    """Load the CUDA libraries as the runner does. onnxruntime prints the missing ones; nothing is raised."""
    ort.preload_dlls()
