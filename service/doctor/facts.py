"""What is found on a machine: plain values, so that a test can make up any machine."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Gpu:
    """capability: NVIDIA's compute capability. memory, free: bytes; free is None if the driver would not say."""

    name: str
    capability: str
    memory: int
    free: int | None


@dataclass(frozen=True, slots=True)
class Driver:
    """path: of libcuda.so.1, with links followed. cuda: the newest CUDA version it supports, if it knows one.

    gpus: counted from 0, as in `cuda:0`. problem: why there are none.
    """

    path: str
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """onnxruntime, once imported. cuda: the CUDA version it was built for, or empty.

    libraries: what its CUDA provider needs, and the path where the loader finds it. auto: the devices that
    `--device auto` takes.
    """

    version: str
    cuda: str
    providers: tuple[str, ...]
    libraries: dict[str, str | None]
    auto: tuple[str, ...]
    auto_why: str


@dataclass(frozen=True, slots=True)
class Machine:
    """cores may be a fraction. memory, free: bytes. files, files_limit: open files, and what the user may raise it to.

    nodes: the device files of NVIDIA's GPUs. visible_devices: CUDA_VISIBLE_DEVICES, if it is set.
    """

    cores: float
    memory: int
    free: int
    files: int
    files_limit: int
    container: bool
    nodes: tuple[str, ...]
    visible_devices: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """packages: those that install the Python package `onnxruntime`, and their versions. bindings: NVIDIA's for Python,
    their version.

    runtime_problem: why there is no runtime. sessions: for each device that was tried, what went wrong, or None.
    """

    python: str
    unroll: str
    packages: dict[str, str]
    machine: Machine
    bindings: str | None = None
    driver: Driver | None = None
    runtime: Runtime | None = None
    runtime_problem: str | None = None
    sessions: dict[str, str | None] = field(default_factory=dict)
