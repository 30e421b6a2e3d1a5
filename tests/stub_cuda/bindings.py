"""Importing this module puts the stub behind `cuda.bindings`, as its runtime bypasses libraries of that name.

Only for a script over the stub. Types, enumerations and signatures stay those of the real bindings.
"""

import inspect
from collections.abc import Callable
from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_void_p
from types import ModuleType
from typing import Any

from cuda.bindings import driver, nvrtc, runtime

_LIBRARY = CDLL("libcudart.so.13")

#: Results of each call besides the error code: (index among the C arguments, type).
_RUNTIME = {
    "cudaDeviceGetAttribute": [(0, c_int)],
    "cudaEventCreateWithFlags": [(0, c_void_p)],
    "cudaEventDestroy": [],
    "cudaEventQuery": [],
    "cudaEventRecord": [],
    "cudaEventSynchronize": [],
    "cudaFree": [],
    "cudaFreeHost": [],
    "cudaGetLastError": [],
    "cudaGraphDestroy": [],
    "cudaGraphExecDestroy": [],
    "cudaGraphInstantiate": [(0, c_void_p)],
    "cudaGraphLaunch": [],
    "cudaHostAlloc": [(0, c_void_p)],
    "cudaMalloc": [(0, c_void_p)],
    "cudaMemGetInfo": [(0, c_size_t), (1, c_size_t)],
    "cudaMemcpyAsync": [],
    "cudaMemsetAsync": [],
    "cudaSetDevice": [],
    "cudaStreamBeginCapture": [],
    "cudaStreamCreateWithFlags": [(0, c_void_p)],
    "cudaStreamDestroy": [],
    "cudaStreamEndCapture": [(1, c_void_p)],
    "cudaStreamSynchronize": [],
}
_DRIVER = {"cuModuleGetFunction": [(0, c_void_p)], "cuModuleLoadData": [(0, c_void_p)], "cuModuleUnload": []}
#: Compiling gives a program of no bytes.
_NVRTC = {
    "nvrtcCompileProgram": [],
    "nvrtcCreateProgram": [(0, c_void_p)],
    "nvrtcDestroyProgram": [],
    "nvrtcGetCUBIN": [],
    "nvrtcGetCUBINSize": [(1, c_size_t)],
    "nvrtcGetProgramLog": [],
    "nvrtcGetProgramLogSize": [(1, c_size_t)],
}


def _replace(module: ModuleType, error: Callable[[int], Any], calls: dict[str, list]) -> None:
    for name, returned in calls.items():
        setattr(module, name, _call(name, inspect.signature(getattr(module, name)), error, returned))


def _call(name: str, signature: inspect.Signature, error: Callable[[int], Any], returned: list) -> Callable[..., tuple]:
    function = getattr(_LIBRARY, name)

    def call(*arguments: Any) -> tuple:
        signature.bind(*arguments)
        values = [kind() for _, kind in returned]
        given = list(map(_argument, arguments))
        for (place, _), value in zip(returned, values, strict=True):
            given.insert(place, byref(value))
        code = function(*given)
        return error(code), *[value.value or 0 for value in values]

    return call


def _argument(value: Any) -> Any:
    if isinstance(value, bytes):
        return c_char_p(value)
    return c_void_p(int(value)) if isinstance(value, int) or hasattr(value, "__int__") else None


def _launch_kernel(config: Any, function: Any, parameters: Any, extra: Any) -> tuple:
    grid, block = ([getattr(config, f"{what}Dim{axis}") for axis in "XYZ"] for what in ("grid", "block"))
    arguments = [function, *grid, *block, config.sharedMemBytes, config.hStream]
    return (driver.CUresult(_LIBRARY.cuLaunchKernel(*map(_argument, arguments))),)


_replace(runtime, runtime.cudaError_t, _RUNTIME)
_replace(driver, driver.CUresult, _DRIVER)
_replace(nvrtc, nvrtc.nvrtcResult, _NVRTC)
driver.cuLaunchKernelEx = _launch_kernel
driver.cuFuncSetAttribute = lambda function, attribute, value: (driver.CUresult.CUDA_SUCCESS,)
