"""One model in onnxruntime: the only file that imports it. A device that was asked for and is not used is an error."""

import ctypes
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bundle import Manifest
from bundle.golden import Arrays

_LOG_ERRORS = 3


class DeviceUnavailable(Exception):
    """The device asked for cannot be used, with what is missing."""


def resolve_device(device: str) -> tuple[str, str]:
    """`cpu`, `cuda:N` or `auto` → the device to use, and why.

    `auto` takes cuda:0 if it is there. Raises DeviceUnavailable if `cuda:N` is not, ValueError for other words.
    """
    if device == "cpu":
        return "cpu", "asked for"
    if device == "auto":
        missing = _missing_for_cuda(0)
        return ("cpu", f"no GPU: {missing}") if missing else ("cuda:0", "a GPU was found")
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdigit():
        raise ValueError(f"device {device!r}: use cpu, cuda:N or auto")
    if missing := _missing_for_cuda(int(index)):
        raise DeviceUnavailable(f"{device} was asked for, but {missing}; --device cpu or auto serves without it")
    return device, "asked for"


def _missing_for_cuda(index: int) -> str | None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider (install onnxruntime-gpu, the extra `gpu`)"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver (libcuda.so.1) is not installed"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return "the NVIDIA driver finds no usable GPU"
    return None if index < count.value else f"there are {count.value} GPUs, counted from 0"


class Runner:
    """`runner(inputs, state, sequence_lens)` calls the graph; `device` is `cpu` or `cuda:N`."""

    def __init__(self, model: Path, manifest: Manifest, device: str = "cpu", threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.device = device
        if device == "cpu":
            providers: list = ["CPUExecutionProvider"]
        else:
            ort.preload_dlls()
            providers = [("CUDAExecutionProvider", {"device_id": device.partition(":")[2], "use_tf32": "0"})]
        try:
            self.session = ort.InferenceSession(str(model), options, providers=providers)
        except Exception as error:  # its exceptions have no base class of their own
            raise ValueError(f"onnxruntime cannot load it: {error}") from error
        self.provider = self.session.get_providers()[0]
        if self.provider != (providers[0] if device == "cpu" else "CUDAExecutionProvider"):
            raise DeviceUnavailable(
                f"onnxruntime runs on {self.provider} instead of {device}: its CUDA libraries could not be loaded "
                "(pip install 'onnxruntime-gpu[cuda,cudnn]' brings them)"
            )
        _check_names("inputs", self.session.get_inputs(), [t.name for t in manifest.inputs], "state", "sequence_lens")
        _check_names("outputs", self.session.get_outputs(), [t.name for t in manifest.outputs], "state_out")
        self._outputs = [*(tensor.name for tensor in manifest.outputs), "state_out"]

    def __call__(self, inputs: Arrays, state: np.ndarray, sequence_lens: np.ndarray) -> tuple[Arrays, np.ndarray]:
        """inputs: each (batch, time, *shape); state: (batch, state_size); sequence_lens: (batch,) int32, each >= 1.

        Returns the outputs by name and state_out (batch, state_size).
        """
        # An empty batch or T = 0 aborts the process inside onnxruntime, and a length of 0 zeroes the state.
        if not len(state) or sequence_lens.min() < 1:
            raise ValueError("a batch needs rows, and each row at least one time step")
        *outputs, state_out = self.session.run(
            self._outputs, {**inputs, "state": state, "sequence_lens": sequence_lens}
        )
        return dict(zip(self._outputs, outputs, strict=False)), state_out


class StepBuffers:
    """Calls of the graph for one step of up to `max_rows` rows, on memory bound to it: cheaper than passing arrays.

    Fill `inputs`, each (max_rows, 1, *shape), and `state` (max_rows, state_size) up to the rows of the call; `run`
    fills `outputs`, each (max_rows, 1, *shape) or (max_rows, *shape), and `state_out` as far. The next call overwrites
    them.
    """

    def __init__(self, runner: Runner, manifest: Manifest, max_rows: int) -> None:
        self.inputs = [np.zeros((max_rows, 1, *spec.shape), spec.numpy) for spec in manifest.inputs]
        self.outputs = [np.zeros((max_rows, *(1,) * spec.time, *spec.shape), spec.numpy) for spec in manifest.outputs]
        self.state = np.zeros((max_rows, manifest.state_size), np.float32)
        self.state_out = np.zeros_like(self.state)
        lens = np.ones(max_rows, np.int32)
        names = [spec.name for spec in manifest.inputs]
        self._bound_inputs = dict(
            zip([*names, "state", "sequence_lens"], [*self.inputs, self.state, lens], strict=True)
        )
        names = [spec.name for spec in manifest.outputs]
        self._bound_outputs = dict(zip([*names, "state_out"], [*self.outputs, self.state_out], strict=True))
        self._session = runner.session
        self._bindings: dict[int, ort.IOBinding] = {}

    def run(self, rows: int) -> None:
        binding = self._bindings.get(rows)
        if binding is None:
            binding = self._bindings[rows] = self._bind(rows)
        self._session.run_with_iobinding(binding)

    def _bind(self, rows: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, array in self._bound_inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, (rows, *array.shape[1:]), array.ctypes.data)
        for name, array in self._bound_outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, (rows, *array.shape[1:]), array.ctypes.data)
        return binding


def _check_names(what: str, found: Iterable, model: list[str], *own: str) -> None:
    names = {node.name for node in found}
    if names != {*model, *own}:
        raise ValueError(f"the graph's {what} are {sorted(names)}, the manifest needs {sorted({*model, *own})}")
