"""`--device` on a machine without a GPU or without CUDA libraries."""

from pathlib import Path

import onnxruntime
import pytest

from unroll import bundle
from unroll.service import app
from unroll.service.engine.runner import DeviceUnavailable, Runner, resolve_devices
from unroll.service.settings import Settings


def settings(repository: Path, device: str) -> Settings:
    return Settings(repository=repository, device=device)


@pytest.fixture
def driver_without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is found, but onnxruntime cannot use it."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    if resolve_devices("auto")[0] != ("cpu",):
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(app, "resolve_devices", lambda wanted: (("cuda:0",), "a GPU was found"))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)


@pytest.mark.usefixtures("driver_without_libraries")
def test_auto_falls_back_to_the_cpu(repository: Path):
    _, server = app.build(settings(repository, "auto"))
    assert {model.serving.provider for model in server.models} == {"CPUExecutionProvider"}


@pytest.mark.usefixtures("driver_without_libraries")
def test_requested_device_does_not_fall_back(repository: Path):
    with pytest.raises(DeviceUnavailable, match=r"cuda:0 (cannot be used|needs NVIDIA's Python bindings)"):
        app.build(settings(repository, "cuda:0"))


@pytest.mark.usefixtures("driver_without_libraries")
def test_onnxruntime_does_not_fall_back_in_silence(repository: Path):
    found = bundle.read(repository / "lstm" / "1")
    with pytest.raises(DeviceUnavailable, match="onnxruntime runs on CPUExecutionProvider instead of cuda:0"):
        Runner(found.model, found.manifest, "cuda:0")


def test_precision_unsupported_on_the_cpu_is_refused(repository: Path):
    with pytest.raises(ValueError, match="precision tf32 needs a GPU"):
        app.build(Settings(repository=repository, device="cpu", precision="tf32"))


def test_a_device_that_fails_leaves_the_store_to_the_cpu(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A process can open a store's folder only once."""
    monkeypatch.setattr(app, "resolve_devices", lambda device: (["cuda:9"], "as a test has it"))
    _, state = app.build(Settings(repository=repository, device="auto", store=f"file://{tmp_path}/store"))
    assert {model.serving.provider for model in state.models} == {"CPUExecutionProvider"}
