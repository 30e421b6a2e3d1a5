"""The NVIDIA driver and its GPUs, through the driver's own library; nothing else needs to be installed."""

from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from pathlib import Path
from typing import Any

from unroll.service.doctor.facts import Driver, Gpu

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_LIBRARY = "libcuda.so.1"


def find() -> Driver | None:
    """Return the driver, or None if its library is missing."""
    try:
        library = CDLL(_LIBRARY)
    except OSError:
        return None
    return ask(library, path_of("libcuda.so") or _LIBRARY)


def path_of(name: str) -> str | None:
    """Return the file, with links followed, of a library that this process has loaded and whose name begins so."""
    paths = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return next((path for path in paths if Path(path).name.startswith(name)), None)


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
