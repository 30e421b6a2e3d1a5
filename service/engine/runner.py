"""Runs one model in onnxruntime. If onnxruntime does not use the requested device, that is an error."""

import ctypes
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import onnxruntime as ort

from unroll.bundle import CRASHING_OPTIMIZERS, Manifest
from unroll.bundle.golden import Arrays
from unroll.service.engine.tensor_ref import TensorRef

_LOG_ERRORS = 3


class DeviceUnavailable(Exception):
    """A requested device cannot be used; the message says what is missing."""


def resolve_devices(wanted: str) -> tuple[tuple[str, ...], str]:
    """Return the devices to use, and the reason.

    Args:
        wanted: `cpu`, one or several `cuda:N` separated by commas, or `auto`: cuda:0 if there is a GPU, else cpu.

    Raises:
        DeviceUnavailable: A requested GPU cannot be used.
        ValueError: `wanted` is invalid.
    """
    if wanted == "cpu":
        return ("cpu",), "requested"
    if wanted == "auto":
        missing = _missing_for_cuda(0)
        return (("cpu",), f"no GPU: {missing}") if missing else (("cuda:0",), "a GPU was found")
    devices = tuple(wanted.split(","))
    if not all(re.fullmatch(r"cuda:\d+", device) for device in devices) or len(set(devices)) < len(devices):
        raise ValueError(f"device {wanted!r}: use cpu, auto, or GPUs as in cuda:0 or cuda:0,cuda:1")
    for device in devices:
        if missing := _missing_for_cuda(int(device.partition(":")[2])):
            raise DeviceUnavailable(f"{device} was requested, but {missing}; --device cpu or auto works without it")
    return devices, "requested"


def installed() -> dict[str, Any]:
    """Return onnxruntime's version, the CUDA version it was built for (empty if none), and its providers."""
    cuda = getattr(ort, "cuda_version", "")
    return {"version": ort.__version__, "cuda": cuda, "providers": ort.get_available_providers()}


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
    """A bundle's graph in onnxruntime: `runner(inputs, state, sequence_lens)` calls it.

    Args:
        model: The serialised graph.
        device: `cpu` or `cuda:N`.
        threads: onnxruntime's threads for one call, on the CPU.
        stream: Address of the CUDA stream to run on, instead of one of onnxruntime's own.
        tf32: Matrix products on a GPU may round their operands to 10 bits of mantissa.
    """

    def __init__(
        self,
        model: bytes,
        manifest: Manifest,
        device: str = "cpu",
        threads: int = 1,
        *,
        stream: int | None = None,
        tf32: bool = False,
    ) -> None:
        self._open = partial(_open, device=device, threads=threads, stream=stream, tf32=tf32)
        self.session = self._open(model)
        self.provider = self.session.get_providers()[0]
        _check_names("inputs", self.session.get_inputs(), [t.name for t in manifest.inputs], "state", "sequence_lens")
        _check_names("outputs", self.session.get_outputs(), [t.name for t in manifest.outputs], "state_out")
        self._inputs = [*(tensor.name for tensor in manifest.inputs), "state"]
        self._outputs = [*(tensor.name for tensor in manifest.outputs), "state_out"]

    def __call__(self, inputs: Arrays, state: np.ndarray, sequence_lens: np.ndarray) -> tuple[Arrays, np.ndarray]:
        """Call the graph.

        Args:
            inputs: By name, each (batch, time, *shape).
            state: The state rows, (batch, state_size) float32.
            sequence_lens: Time steps of each row, (batch,) int32, each at least 1.

        Returns:
            The outputs by name, and the new state rows, (batch, state_size).
        """
        # An empty batch or T = 0 aborts the process inside onnxruntime, and a length of 0 zeroes the state.
        if not len(state) or sequence_lens.min() < 1:
            raise ValueError("a batch needs rows, and each row at least one time step")
        *outputs, state_out = self.session.run(
            self._outputs, {**inputs, "state": state, "sequence_lens": sequence_lens}
        )
        return dict(zip(self._outputs, outputs, strict=False)), state_out

    def bind(self, inputs: Iterable[TensorRef], lens: np.ndarray, outputs: Iterable[TensorRef]) -> "BoundCall":
        """Return a call that reads and writes this memory each time it runs.

        Args:
            inputs: The model's inputs in the manifest's order, then the state.
            lens: Time steps of each row, (batch,) int32, on the host. A captured call keeps these values.
            outputs: The model's outputs in the manifest's order, then the new state.
        """
        named = dict(zip(self._inputs, inputs, strict=True)) | {"sequence_lens": TensorRef.of(lens)}
        return BoundCall(self.session, named, dict(zip(self._outputs, outputs, strict=True)), keep=lens)

    def part(self, model: bytes) -> "BindPart":
        """Open another graph with the same device and options. Returns a function that binds a call."""
        return partial(BoundCall, self._open(model))


class BoundCall:
    """A call of a graph on bound memory, which costs less than passing arrays.

    Args:
        keep: An object that must live as long as the call.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Mapping[str, TensorRef],
        outputs: Mapping[str, TensorRef],
        keep: object = None,
    ) -> None:
        self._session, self._keep = session, keep
        self._binding = session.io_binding()
        for name, memory in inputs.items():
            self._binding.bind_input(
                name, memory.device_type, memory.device_index, memory.dtype, memory.shape, memory.pointer
            )
        for name, memory in outputs.items():
            self._binding.bind_output(
                name, memory.device_type, memory.device_index, memory.dtype, memory.shape, memory.pointer
            )

    def run(self) -> None:
        """Run the call, and return when it is done and its temporary memory is free."""
        self._session.run_with_iobinding(self._binding)

    def queue(self) -> None:
        """Queue the call on the stream that was passed in, without waiting; a capture can record it."""
        self._session.run_with_iobinding(self._binding, _without_waiting())


#: Memory by input name, and by output name.
BindPart = Callable[[Mapping[str, TensorRef], Mapping[str, TensorRef]], BoundCall]


@cache
def _without_waiting() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry(
        "gpu_graph_id", "-1"
    )  # disables onnxruntime's own graphs; without this entry each call throws internally
    return options


def _open(model: bytes, device: str, threads: int, stream: int | None, tf32: bool) -> ort.InferenceSession:
    """Open a graph. Raises ValueError if onnxruntime cannot load it, DeviceUnavailable if it chooses another device."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = "CPUExecutionProvider"
    providers: list[tuple[str, dict[str, str]]] = [(wanted, {})]
    if device != "cpu":
        ort.preload_dlls()
        cuda = {"device_id": device.partition(":")[2], "use_tf32": str(int(tf32))}
        if stream is not None:
            cuda["user_compute_stream"] = str(stream)
        wanted = "CUDAExecutionProvider"
        providers = [(wanted, cuda)]
    try:
        session = ort.InferenceSession(model, options, providers=providers, disabled_optimizers=CRASHING_OPTIMIZERS)
    except Exception as error:  # its exceptions have no common base class
        raise ValueError(f"onnxruntime cannot load it: {error}") from error
    provider = session.get_providers()[0]
    if provider != wanted:
        raise DeviceUnavailable(
            f"onnxruntime runs on {provider} instead of {device}: its CUDA libraries could not be loaded "
            "(pip install 'onnxruntime-gpu[cuda,cudnn]' installs them)"
        )
    return session


def to_float16(model: bytes) -> bytes:
    """Return the graph with weights and arithmetic in float16; inputs, outputs and state stay float32.

    Raises:
        DeviceUnavailable: The package `onnx` is missing.
    """
    try:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise DeviceUnavailable(f"float16 needs the package onnx (pip install onnx): {error}") from error
    return convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True).SerializeToString()


def _check_names(what: str, found: Iterable, model: list[str], *own: str) -> None:
    names = {node.name for node in found}
    if names != {*model, *own}:
        raise ValueError(f"the graph's {what} are {sorted(names)}; the manifest needs {sorted({*model, *own})}")
