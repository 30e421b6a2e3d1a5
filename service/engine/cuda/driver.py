"""A GPU, through NVIDIA's Python bindings. Only this file imports them."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc, runtime

from unroll.service.engine.cuda.device import Argument, CompilationFailed, Kernel, OutOfDeviceMemory
from unroll.service.engine.engine import DeviceFailed
from unroll.service.engine.tensor_ref import TensorRef

_COPY = runtime.cudaMemcpyKind
_C_TYPES = {int: ctypes.c_void_p, np.int32: ctypes.c_int, np.float32: ctypes.c_float}


class Cuda:
    """Device number `index`, and one stream. Raises DeviceFailed."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._index = index
        self._enter()
        self.stream = int(_check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        attribute = runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount
        self.multiprocessors = int(_check(runtime.cudaDeviceGetAttribute(attribute, index)))
        self._functions: dict[Kernel, Any] = {}
        self._allocated: set[int] = set()
        self._blocks: list[int] = []
        self._graphs: list[CapturedGraph] = []

    def close(self) -> None:
        self.synchronize()
        for graph in self._graphs:
            graph.destroy()
        for pointer in self._allocated:
            _check(runtime.cudaFree(pointer))
        for pointer in self._blocks:
            _check(runtime.cudaFreeHost(pointer))
        self._graphs, self._allocated, self._blocks = [], set(), []

    def allocate(self, shape: Sequence[int], dtype: Any) -> TensorRef:
        self._enter()
        wanted = TensorRef(0, tuple(shape), np.dtype(dtype), "cuda", self._index)
        error, pointer = runtime.cudaMalloc(max(wanted.nbytes, 1))
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # otherwise the next call reports it again
            raise OutOfDeviceMemory(f"{self.name} has {self.free_bytes():,} bytes free, {wanted.nbytes:,} are needed")
        _check((error,))
        _check(runtime.cudaMemsetAsync(pointer, 0, wanted.nbytes, self.stream))
        self._allocated.add(int(pointer))
        return TensorRef(int(pointer), wanted.shape, wanted.dtype, "cuda", self._index)

    def free(self, memory: TensorRef) -> None:
        self._enter()
        self._allocated.remove(memory.pointer)
        _check(runtime.cudaFree(memory.pointer))

    def host_block(self, nbytes: int) -> np.ndarray:
        self._enter()
        pointer = int(
            _check(runtime.cudaHostAlloc(nbytes, runtime.cudaHostAllocMapped | runtime.cudaHostAllocPortable))
        )
        self._blocks.append(pointer)
        block = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
        block[:] = 0
        return block

    def free_bytes(self) -> int:
        self._enter()
        free, _ = _check(runtime.cudaMemGetInfo())
        return int(free)

    def upload(self, target: int, array: np.ndarray) -> None:
        self._copy(target, array.ctypes.data, array.nbytes, _COPY.cudaMemcpyHostToDevice)
        self.synchronize()

    def download(self, array: np.ndarray, source: int) -> None:
        self._copy(array.ctypes.data, source, array.nbytes, _COPY.cudaMemcpyDeviceToHost)
        self.synchronize()

    def download_rows(self, rows: np.ndarray, sources: Sequence[int]) -> None:
        for row, source in zip(rows, sources, strict=True):
            self._copy(row.ctypes.data, source, row.nbytes, _COPY.cudaMemcpyDeviceToHost)
        self.synchronize()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._copy(target, source, nbytes, _COPY.cudaMemcpyDeviceToDevice)

    def prepare(self, kernel: Kernel) -> None:
        self._enter()
        if kernel not in self._functions:
            self._functions[kernel] = self._load(kernel)

    def run(self, kernel: Kernel, blocks: tuple[int, int], *arguments: Argument) -> None:
        self.prepare(kernel)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *blocks, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = kernel.shared_bytes
        config.hStream = driver.CUstream(self.stream)
        config.attrs = _launch_attributes(kernel)
        config.numAttrs = len(config.attrs)
        packed = tuple(arguments), tuple([_C_TYPES[type(argument)] for argument in arguments])
        _check(driver.cuLaunchKernelEx(config, self._functions[kernel], packed, 0))

    def _load(self, kernel: Kernel) -> Any:
        module = _check(driver.cuModuleLoadData(_compiled(kernel.file, kernel.constants, *_capability(self._index))))
        function = _check(driver.cuModuleGetFunction(module, kernel.name.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, most, kernel.shared_bytes))
        return function

    def capture(self, queue: Callable[[], None]) -> "CapturedGraph":
        self._enter()
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _check(runtime.cudaStreamBeginCapture(self.stream, mode))
        try:
            queue()
        except BaseException:
            runtime.cudaStreamEndCapture(self.stream)
            runtime.cudaGetLastError()  # the cause is being raised
            raise
        graph = _check(runtime.cudaStreamEndCapture(self.stream))
        self._graphs.append(CapturedGraph(graph, self._index, self.stream))
        return self._graphs[-1]

    def event(self) -> "CudaEvent":
        self._enter()
        return CudaEvent(self.stream)

    def synchronize(self) -> None:
        self._enter()
        _check(runtime.cudaStreamSynchronize(self.stream))

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        self._enter()
        _check(runtime.cudaMemcpyAsync(target, source, nbytes, kind, self.stream))

    def _enter(self) -> None:
        """Select the device for this thread: CUDA keeps the current device per thread."""
        _check(runtime.cudaSetDevice(self._index))


class CapturedGraph:
    def __init__(self, graph: Any, index: int, stream: int) -> None:
        self._graph, self._index, self._stream = graph, index, stream
        self._executable = _check(runtime.cudaGraphInstantiate(graph, 0))

    def launch(self) -> None:
        runtime.cudaSetDevice(self._index)
        _check(runtime.cudaGraphLaunch(self._executable, self._stream))

    def destroy(self) -> None:
        _check(runtime.cudaGraphExecDestroy(self._executable))
        _check(runtime.cudaGraphDestroy(self._graph))

    def nodes(self) -> list[Any]:
        """Return the graph's nodes as the bindings' `cudaGraphNode_t`."""
        _, count = _check(runtime.cudaGraphGetNodes(self._graph))
        nodes, count = _check(runtime.cudaGraphGetNodes(self._graph, count))
        return list(nodes[:count])


class CudaEvent:
    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._event = _check(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming))

    def record(self) -> None:
        _check(runtime.cudaEventRecord(self._event, self._stream))

    def wait(self) -> None:
        _check(runtime.cudaEventSynchronize(self._event))


def _capability(index: int) -> tuple[int, int]:
    which = runtime.cudaDeviceAttr
    major = _check(runtime.cudaDeviceGetAttribute(which.cudaDevAttrComputeCapabilityMajor, index))
    minor = _check(runtime.cudaDeviceGetAttribute(which.cudaDevAttrComputeCapabilityMinor, index))
    return int(major), int(minor)


@cache
def _compiled(file: str, constants: tuple[tuple[str, int], ...], major: int, minor: int) -> bytes:
    source = (files("unroll.service.engine.cuda") / file).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{name}={n}" for name, n in constants)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error:
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CompilationFailed(f"{file} cannot be compiled for sm_{major}{minor}: {log.decode()}")
    code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def _launch_attributes(kernel: Kernel) -> list[Any]:
    which = driver.CUlaunchAttributeID
    found = []
    if kernel.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = which.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = kernel.cluster, 1, 1
        found.append(cluster)
    if kernel.overlaps_previous:
        early = driver.CUlaunchAttribute()
        early.id = which.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        found.append(early)
    return found


def _check(result: tuple) -> Any:
    """Return the values of a CUDA call. Raises DeviceFailed if it failed."""
    error, *values = result
    if error:
        raise DeviceFailed(f"CUDA reports {error.name}")
    return values[0] if len(values) == 1 else values
