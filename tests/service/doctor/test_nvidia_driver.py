"""Queries of the driver, answered by a fake library."""

import _ctypes
from ctypes import c_char_p
from pathlib import Path
from typing import Any

from unroll.service.doctor import nvidia_driver
from unroll.service.doctor.facts import Driver, Gpu

PATH = "/usr/lib/libcuda.so.580.65.06"


class Cuda:
    """The functions of libcuda.so.1 that `driver.py` calls. Pointers are ctypes `byref` objects with target `_obj`."""

    def __init__(self, gpus: list[Gpu], code: int = 0) -> None:
        self.gpus = gpus
        self.code = code
        self.contexts = 0

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = c_char_p(b"no CUDA-capable device is detected").value
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self.gpus[device.value].name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = self.gpus[device.value].memory
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        major, minor = self.gpus[device.value].capability.split(".")
        value._obj.value = int({75: major, 76: minor}[attribute])
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        if self.gpus[device.value].free is None:
            return 46
        context._obj.value = 1 + device.value
        self.contexts += 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.current = context.value - 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, memory: Any) -> int:
        free._obj.value = self.gpus[self.current].free
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.contexts -= 1
        return 0


def test_it_tells_its_gpus():
    gpus = [Gpu("NVIDIA H100", "9.0", 80 * 2**30, 79 * 2**30), Gpu("NVIDIA T4", "7.5", 16 * 2**30, None)]
    cuda = Cuda(gpus)
    assert nvidia_driver.ask(cuda, PATH) == Driver(PATH, "13.1", tuple(gpus))
    assert cuda.contexts == 0  # no context is leaked


def test_without_devices_it_says_why():
    problem = "no CUDA-capable device is detected (CUDA error 100)"
    assert nvidia_driver.ask(Cuda([], code=100), PATH) == Driver(PATH, "13.1", problem=problem)


def test_a_count_of_none():
    assert nvidia_driver.ask(Cuda([]), PATH).problem == "it counts 0 GPUs"


def test_where_a_library_is():
    file = Path(_ctypes.__file__)
    assert nvidia_driver.path_of(file.name.partition(".")[0]) == str(file.resolve())
    assert nvidia_driver.path_of("libthere-is-none.so") is None
