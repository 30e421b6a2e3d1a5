"""Real libraries: their dependencies agree with the loader's, and their paths are found."""

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from unroll.service.doctor import libraries, trial

CAPI = Path(onnxruntime.__file__).parent / "capi"


def test_what_a_library_needs():
    [module] = CAPI.glob("onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in libraries.needed(module)
    for extension in Path(np.__file__).parent.rglob("_multiarray_umath*.so"):
        assert set(libraries.needed(extension)) <= set(loaded_by(extension))


def loaded_by(file: Path) -> list[str]:
    """Names that ldd lists, transitive dependencies included."""
    lines = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [os.path.basename(line.split()[0]) for line in lines]


def test_a_file_that_is_no_library():
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        libraries.needed(Path(__file__))


def test_where_a_library_is_found():
    found = libraries.find("libc.so.6")
    assert found is not None
    assert Path(found).exists()
    assert libraries.find("libthere-is-none.so.7") is None


def test_what_the_cuda_provider_needs():
    if not (CAPI / "libonnxruntime_providers_cuda.so").exists():
        pytest.skip("needs onnxruntime-gpu")
    names = [name.partition(".")[0] for name in trial.cuda_libraries(CAPI)]
    assert {"libcublas", "libcublasLt", "libcudart", "libcudnn"} <= set(names)
    assert not {"libc", "libm", "libcuda"} & set(names)
    assert len(names) == len(set(names))


def test_without_a_cuda_provider_nothing_is_needed(tmp_path: Path):
    assert trial.cuda_libraries(tmp_path) == []
