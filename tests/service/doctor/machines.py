"""Synthetic machines."""

from dataclasses import replace

from unroll.service.doctor.facts import Driver, Facts, Gpu, Machine, Runtime

WITH_CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30, 79 * 2**30)
DRIVER = Driver("/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06", "13.0", (H100,))
NO_DEVICE = replace(DRIVER, gpus=(), problem="no CUDA-capable device is detected (CUDA error 100)")
BARE = Machine(4.0, 16 * 2**30, 8 * 2**30, 65_536, 65_536, container=False, nodes=())

GPU = Facts(
    python="3.11.7",
    unroll="0.1.0",
    packages={"onnxruntime-gpu": "1.31.1"},
    machine=replace(BARE, nodes=("/dev/nvidia0", "/dev/nvidiactl")),
    bindings="13.0.1",
    driver=DRIVER,
    runtime=Runtime("1.31.1", "13.0", WITH_CUDA, ("cuda:0",), "a GPU was found"),
    sessions={"cpu": None, "cuda:0": None},
)
CPU = replace(
    GPU,
    packages={"onnxruntime": "1.32.0"},
    machine=BARE,
    bindings=None,
    driver=None,
    runtime=Runtime("1.32.0", "", ("CPUExecutionProvider",), ("cpu",), "no GPU"),
    sessions={"cpu": None},
)
