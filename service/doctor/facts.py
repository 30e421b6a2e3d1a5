"""The facts about a machine: plain values, so that tests can describe any machine."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        capability: NVIDIA's compute capability.
        free: Free bytes; None if the driver does not report them.
    """

    name: str
    capability: str
    memory: int
    free: int | None


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        path: Path of libcuda.so.1, with links followed.
        cuda: The newest CUDA version that it supports, if it reports one.
    """

    path: str
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """The installed onnxruntime.

    Attributes:
        cuda: The CUDA version it was built for; empty if none.
        auto: The devices that `--device auto` selects.
        auto_why: Why it selects them.
    """

    version: str
    cuda: str
    providers: tuple[str, ...]
    auto: tuple[str, ...]
    auto_why: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, as this process sees it.

    Attributes:
        cores: CPU cores; may be a fraction.
        memory, free: Bytes of memory, and of free memory.
        files, files_limit: Limit of open files, and the limit that the user may raise it to.
        nodes: Device files of NVIDIA's GPUs.
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
    """All facts.

    Attributes:
        packages: Versions of the distributions that install the Python package `onnxruntime`.
        bindings: Version of NVIDIA's Python bindings.
        sessions: The problem, or None, for each device that was tried.
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
