"""Where a model is served, and how: on the host or on a GPU, in which precision, with room for how many rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import structlog

from unroll.bundle import Bundle, GoldenMismatch
from unroll.service.engine.base import DeviceFailed, Engine
from unroll.service.engine.cuda.base import CompilationFailed, Device, OutOfDeviceMemory
from unroll.service.engine.cuda.engine import CudaEngine
from unroll.service.engine.cuda.layout import buckets
from unroll.service.engine.cuda.parts import Layer, NotSeparable, Segment
from unroll.service.engine.cuda.step_call import GATHER
from unroll.service.engine.host import HostEngine
from unroll.service.engine.proof import Proof, prove_steps
from unroll.service.engine.runner import DeviceUnavailable, Runner, to_float16

_log = structlog.get_logger(__name__)

Cells = Literal["fused", "onnxruntime"]
Precision = Literal["float32", "tf32", "float16"]

#: Bits of mantissa that float32 has more: so much larger may a difference from PyTorch be.
_BITS_LOST: dict[Precision, int] = {"float32": 0, "tf32": 13, "float16": 13}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """threads: onnxruntime's for one call, on the host. memory_share: what part of the free memory a model's state rows
    may take. On a GPU: precision; buckets, the sizes of the calls of single steps, () for the usual ones; cells, what
    runs the LSTM and GRU layers in them."""

    threads: int = 1
    precision: Precision = "float32"
    buckets: tuple[int, ...] = ()
    cells: Cells = "fused"
    memory_share: float = 0.5


class NoRoom(Exception):
    """The state rows do not fit in the device's memory."""


class Place(Protocol):
    """runner: of the bundle's graph, on the device. slack: how many of the manifest's tolerances it may be off."""

    runner: Runner
    slack: float

    def room(self, row_bytes: int, beside_bytes: int) -> int:
        """Sessions that fit in the share of the free memory: of the state row, and beside it on the host."""
        ...

    def engine(self, rows: int, max_batch: int) -> tuple[Engine, Proof]:
        """With what the golden vectors say of it.

        Raises NoRoom, GoldenMismatch, or ValueError if the buckets have no room for `max_batch` rows.
        """
        ...


class HostPlace:
    slack = 1.0

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self._manifest, self._golden, self._options = bundle.manifest, bundle.golden, options
        self.runner = Runner(bundle.model_path, bundle.manifest, threads=options.threads)

    def room(self, row_bytes: int, beside_bytes: int) -> int:
        return int(self._options.memory_share * _available_bytes() / (row_bytes + beside_bytes))

    def engine(self, rows: int, max_batch: int) -> tuple[Engine, Proof]:
        engine = HostEngine(self.runner, self._manifest, rows)
        sizes = (1, min(max_batch, len(self._golden.state))) if self._manifest.streamable else ()
        return engine, prove_steps(engine, self._manifest, self._golden, sizes, rows, self.slack)


class CudaPlace:
    def __init__(self, bundle: Bundle, device: Device, options: EngineOptions) -> None:
        self._bundle, self._manifest, self._options = bundle, bundle.manifest, options
        self.device = device
        self.slack = 2.0 ** _BITS_LOST[options.precision]
        self._tf32 = options.precision == "tf32"
        model = to_float16(bundle.model_path) if options.precision == "float16" else bundle.model_path
        self.runner = Runner(model, self._manifest, device.name, stream=device.stream, tf32=self._tf32)

    def room(self, row_bytes: int, beside_bytes: int) -> int:
        share = self._options.memory_share
        return int(share * min(self.device.free_bytes() / row_bytes, _available_bytes() / beside_bytes))

    def engine(self, rows: int, max_batch: int) -> tuple[CudaEngine, Proof]:
        sizes = buckets(self._options.buckets, max_batch) if self._manifest.streamable else ()
        parts = self._parts() if sizes and self._options.cells == "fused" else []
        if parts:
            try:
                return self._proven(rows, sizes, parts)
            except (CompilationFailed, GoldenMismatch) as error:
                self._fall_back(str(error))
        return self._proven(rows, sizes, [])

    def _proven(self, rows: int, sizes: tuple[int, ...], parts: list[Layer | Segment]) -> tuple[CudaEngine, Proof]:
        """What was taken of the device is given back if it raises."""
        try:
            engine = CudaEngine(self.device, self.runner, self._manifest, rows, sizes, parts, tf32=self._tf32)
            return engine, prove_steps(engine, self._manifest, self._bundle.golden, sizes, rows, self.slack)
        except OutOfDeviceMemory as error:
            self.device.close()
            raise NoRoom(f"{rows} state rows do not fit: {error}; lower --session-capacity, or make it auto") from error
        except (CompilationFailed, GoldenMismatch):
            self.device.close()
            raise

    def _parts(self) -> list[Layer | Segment]:
        """Empty if onnxruntime must run the whole model."""
        if "float16" in {self._options.precision, self._manifest.precision}:
            return []
        try:
            from unroll.service.engine.cuda.step_graph import take_apart  # which needs `onnx`

            return take_apart(self._bundle.model_path, self._manifest)
        except (ImportError, NotSeparable) as error:
            self._fall_back(str(error))
            return []

    def _fall_back(self, reason: str) -> None:
        name = f"{self._manifest.name}:{self._manifest.version}"
        _log.warning("onnxruntime runs the layers", model=name, device=self.device.name, reason=reason)


def place(bundle: Bundle, device: str, options: EngineOptions) -> Place:
    """device: `cpu` or `cuda:N`. Raises DeviceUnavailable, or ValueError if the model cannot be loaded there."""
    if device == "cpu":
        if options.precision != "float32":
            raise ValueError(f"precision {options.precision} is for a GPU; on the CPU it is float32")
        return HostPlace(bundle, options)
    own = bundle.manifest.precision
    if own == "int8":
        raise ValueError("it was exported in int8, which is for the CPU; --device cpu serves it")
    if own != "float32" and options.precision != "float32":
        raise ValueError(f"it was exported in {own} already; leave --precision out")
    return CudaPlace(bundle, open_cuda(device), options)


def open_cuda(device: str) -> Device:
    """Raises DeviceUnavailable."""
    try:
        from unroll.service.engine.cuda.driver import Cuda  # where there is no GPU there may be no bindings
    except ImportError as error:
        raise DeviceUnavailable(
            f"{device} needs NVIDIA's bindings, which the extra `gpu` brings (pip install cuda-bindings): {error}"
        ) from error
    try:
        opened = Cuda(int(device.partition(":")[2]))
        opened.prepare(GATHER)
        return opened
    except (CompilationFailed, DeviceFailed, RuntimeError) as error:  # RuntimeError: the bindings miss a library
        raise DeviceUnavailable(f"{device} cannot be used: {error}") from error


def _available_bytes() -> int:
    """Of the host's memory, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
