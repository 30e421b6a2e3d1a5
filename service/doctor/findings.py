"""Judges the facts: each finding is one line that a newcomer can act on.

A missing or unsuitable part is a fault only if a GPU was requested and does not work; otherwise it is a note, since a
model ran on the device. A device on which no model runs is `broken`, requested or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from unroll.service.doctor.facts import Driver, Facts, Machine, Runtime

_CUDA_PROVIDER = "CUDAExecutionProvider"
#: The first driver for each major version of CUDA.
_DRIVERS = {"12": "525", "13": "580"}
#: Each connection is an open file; the default limit on Linux is 1024.
_FILES_FOR_MANY = 8192
_GIB = 2**30


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: The part that was examined.
        needed: The requested device needs it.
    """

    name: str
    status: Status
    says: str
    mend: str | None = None
    needed: bool = True

    @property
    def fault(self) -> bool:
        return self.needed and self.status in (Status.MISSING, Status.BROKEN)


def judge(facts: Facts, device: str) -> list[Finding]:
    """Return the findings. device: The requested device: `cpu`, one or several `cuda:N`, or `auto`."""
    wanted = devices(device, facts.runtime)
    gpu = "cpu" not in wanted and not _work(facts, wanted)
    return [
        Finding("Python", Status.OK, facts.python),
        Finding("Unroll", Status.OK, facts.unroll),
        *_runtime(facts, gpu),
        *_machine(facts.machine),
        _driver(facts, gpu),
        *_gpus(facts.driver),
        *_bindings(facts, gpu),
        *_sessions(facts, wanted),
        _verdict(facts, device, wanted),
    ]


def devices(wanted: str, runtime: Runtime | None) -> tuple[str, ...]:
    """Return the requested devices; for `auto` those that the server would select."""
    if wanted == "auto":
        return runtime.auto if runtime else ("cpu",)
    return tuple(wanted.split(","))


def _runtime(facts: Facts, gpu: bool) -> Iterator[Finding]:
    has_gpu = gpu or bool(facts.driver and facts.driver.gpus)
    install = _with_cuda(facts.machine) if has_gpu else "pip install onnxruntime"
    packages = " and ".join(f"{name} {version}" for name, version in sorted(facts.packages.items()))
    again = f"pip uninstall -y {' '.join(sorted(facts.packages))} && {install}" if facts.packages else install
    if len(facts.packages) > 1:
        says = f"{packages} are installed into the same folder and have overwritten each other's files"
        yield Finding("onnxruntime", Status.BROKEN, says, again)
    elif facts.runtime is None and facts.packages:
        yield Finding("onnxruntime", Status.BROKEN, f"{packages} cannot be imported: {facts.runtime_problem}", again)
    elif facts.runtime is None:
        yield Finding("onnxruntime", Status.MISSING, str(facts.runtime_problem), install)
    else:
        yield Finding("onnxruntime", Status.OK, packages or facts.runtime.version)
    if facts.runtime is not None:
        yield _providers(facts.runtime, gpu, has_gpu, again)


def _providers(runtime: Runtime, gpu: bool, has_gpu: bool, again: str) -> Finding:
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.providers)
    says = providers + (f", for CUDA {runtime.cuda}" if runtime.cuda else "")
    if _CUDA_PROVIDER in runtime.providers or not has_gpu:
        return Finding("providers", Status.OK, says)
    return Finding("providers", _absent(gpu), f"{says}; no provider for an NVIDIA GPU", again)


def _driver(facts: Facts, gpu: bool) -> Finding:
    name, driver = "NVIDIA driver", facts.driver
    nodes = ", ".join(facts.machine.nodes) or "no /dev/nvidia*"
    if driver is None:
        says = f"libcuda.so.1 not found; {nodes}"
        return Finding(name, _absent(gpu), says, _without_driver(facts.machine, gpu))
    cuda = f", for CUDA up to {driver.cuda}" if driver.cuda else ""
    says = f"{_version(driver)}{cuda}; {nodes}"
    if driver.problem:
        return Finding(name, _unfit(gpu), f"{says}; no GPU: {driver.problem}", _without_gpus(facts.machine, gpu))
    built = facts.runtime.cuda if facts.runtime else ""
    if driver.cuda and built and _major(driver.cuda) < _major(built):
        first = _DRIVERS.get(built.partition(".")[0])
        mend = f"install a newer driver on the host{f': {first} or newer' if first else ''}"
        return Finding(name, _unfit(gpu), f"{says}; onnxruntime needs CUDA {built}", mend)
    return Finding(name, Status.OK, says)


def _version(driver: Driver) -> str:
    """Return version and path. The file that libcuda.so.1 links to has the driver's version in its name."""
    version = Path(driver.path).name.removeprefix("libcuda.so.")
    return f"{version} ({driver.path})" if "." in version else driver.path


def _without_driver(machine: Machine, gpu: bool) -> str:
    if machine.container and machine.nodes:
        return "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    if machine.container:
        return _container(gpu)
    return ("" if gpu else "if there is an NVIDIA GPU: ") + "install its driver, 580 or newer, on this machine"


def _without_gpus(machine: Machine, gpu: bool) -> str:
    if machine.visible_devices is not None:
        return f"CUDA_VISIBLE_DEVICES is {machine.visible_devices!r}: unset it, or name an existing GPU"
    if machine.container and not machine.nodes:
        return _container(gpu)
    return "make sure that `nvidia-smi` lists the GPU: restart the machine, or reinstall the driver"


def _container(gpu: bool) -> str:
    condition = "" if gpu else "if the host has an NVIDIA GPU: "
    return (
        f"{condition}start this container with `docker run --gpus all` (Kubernetes: limit nvidia.com/gpu: 1), "
        "on a host with the NVIDIA container toolkit"
    )


def _gpus(driver: Driver | None) -> Iterator[Finding]:
    for index, gpu in enumerate(driver.gpus if driver else ()):
        memory = f"{gpu.memory / _GIB:.1f} GiB"
        free = "in exclusive use" if gpu.free is None else f"{gpu.free / _GIB:.1f} GiB free"
        says = f"{gpu.name}, {memory} of memory, {free}, compute capability {gpu.capability}"
        yield Finding(f"cuda:{index}", Status.OK, says)


def _bindings(facts: Facts, gpu: bool) -> Iterator[Finding]:
    if facts.bindings:
        yield Finding("cuda-bindings", Status.OK, facts.bindings)
    elif gpu or (facts.driver and facts.driver.gpus):
        yield Finding("cuda-bindings", _absent(gpu), "not installed", "pip install cuda-bindings")


def _sessions(facts: Facts, wanted: tuple[str, ...]) -> Iterator[Finding]:
    for device, problem in facts.sessions.items():
        name, needed = f"LSTM on {device}", device in wanted
        if problem is None:
            yield Finding(name, Status.OK, "loaded and run, with correct outputs")
        else:
            has_gpu = device != "cpu" and facts.driver and facts.driver.gpus
            mend = f"if a library is missing: {_with_cuda(facts.machine)}" if has_gpu else None
            yield Finding(name, Status.BROKEN, problem, mend, needed)


def _verdict(facts: Facts, device: str, wanted: tuple[str, ...]) -> Finding:
    name = f"--device {device}"
    if facts.runtime is None:
        return Finding(name, Status.BROKEN, "no device works without onnxruntime", "see above")
    why = f"selects {', '.join(wanted)} ({facts.runtime.auto_why})" if device == "auto" else "requested"
    if _work(facts, wanted):
        return Finding(name, Status.OK, f"{why}; it works")
    others = [other for other in facts.sessions if _work(facts, (other,))]
    mend = "see above" + (f"; `unroll serve --device {others[0]}` works" if others else "")
    return Finding(name, Status.BROKEN, f"{why}; it does not work", mend)


def _with_cuda(machine: Machine) -> str:
    image = " (in Unroll's image: build it with `--build-arg RUNTIME=gpu`)" if machine.container else ""
    return f"pip install 'onnxruntime-gpu[cuda,cudnn]'{image}"


def _work(facts: Facts, wanted: tuple[str, ...]) -> bool:
    return all(facts.sessions.get(device, "not tried") is None for device in wanted)


def _absent(gpu: bool) -> Status:
    return Status.MISSING if gpu else Status.NOTE


def _unfit(gpu: bool) -> Status:
    return Status.BROKEN if gpu else Status.NOTE


def _machine(machine: Machine) -> Iterator[Finding]:
    yield Finding("cores", Status.OK, f"{machine.cores:g}")
    yield Finding("memory", Status.OK, f"{machine.free / _GIB:.1f} GiB free of {machine.memory / _GIB:.1f}")
    if machine.files >= _FILES_FOR_MANY:
        yield Finding("open files", Status.OK, f"{machine.files} at most")
        return
    yield Finding("open files", Status.NOTE, f"{machine.files} at most; each connection is one", _more_files(machine))


def _more_files(machine: Machine) -> str:
    if machine.files_limit >= _FILES_FOR_MANY:
        return f"for many streams: `ulimit -n {machine.files_limit}` in the shell that starts the server"
    if machine.container:
        return "for many streams: `docker run --ulimit nofile=65536`"
    return "for many streams: ask the administrator to raise the limit (LimitNOFILE= of a systemd unit)"


def _major(cuda: str) -> int:
    return int(cuda.partition(".")[0])
