"""The NVIDIA driver and its GPUs, through the driver's own library; nothing else needs to be installed."""

import os
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from typing import Any

from unroll.service.doctor.facts import Driver, Gpu

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_RTLD_DI_LINKMAP = 2


class _LinkMap(Structure):
    _fields_ = (("address", c_void_p), ("name", c_char_p))


def find() -> Driver | None:
    """Return the driver, or None if its library is missing."""
    try:
        library = CDLL("libcuda.so.1")
    except OSError:
        return None
    return ask(library, path_of(library))


def path_of(library: CDLL) -> str:
    """Return the file of a loaded library, with links followed."""
    found = POINTER(_LinkMap)()
    CDLL(None).dlinfo(c_void_p(library._handle), _RTLD_DI_LINKMAP, byref(found))
    return os.path.realpath(os.fsdecode(found.contents.name))


def ask(cuda: Any, path: str) -> Driver:
    version, count = c_int(0), c_int(0)
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(byref(count))
    known = cuda.cuDriverGetVersion(byref(version)) == 0 and version.value
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}" if known else None
    if code:
        return Driver(path, newest, problem=_words(cuda, code))
    if not count.value:
        return Driver(path, newest, problem="it counts 0 GPUs")
    return Driver(path, newest, tuple(_gpu(cuda, index) for index in range(count.value)))


def _gpu(cuda: Any, index: int) -> Gpu:
    device, memory, major, minor = c_int(0), c_size_t(0), c_int(0), c_int(0)
    name = create_string_buffer(256)
    cuda.cuDeviceGet(byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(byref(memory), device)
    cuda.cuDeviceGetAttribute(byref(major), _CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(byref(minor), _CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", memory.value, _free(cuda, device))


def _free(cuda: Any, device: c_int) -> int | None:
    """Return the free bytes. This needs a context, which a GPU in exclusive use by another process refuses."""
    context, free, memory = c_void_p(), c_size_t(0), c_size_t(0)
    if cuda.cuDevicePrimaryCtxRetain(byref(context), device):
        return None
    cuda.cuCtxPushCurrent_v2(context)
    code = cuda.cuMemGetInfo_v2(byref(free), byref(memory))
    cuda.cuCtxPopCurrent_v2(byref(context))
    cuda.cuDevicePrimaryCtxRelease_v2(device)
    return None if code else free.value


def _words(cuda: Any, code: int) -> str:
    text = c_char_p()
    cuda.cuGetErrorString(code, byref(text))
    return f"{text.value.decode() if text.value else 'unknown error'} (CUDA error {code})"
