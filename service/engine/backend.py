"""Backends run a model on the host or a GPU: they choose the engine, and prove it before it serves."""

from dataclasses import dataclass

import structlog

from unroll.bundle import Bundle, GoldenMismatch
from unroll.service.core.choices import Cells, Precision
from unroll.service.core.resources import host_memory
from unroll.service.engine.cuda.cuda_engine import CudaEngine
from unroll.service.engine.cuda.device import CompilationFailed, Device, OutOfDeviceMemory
from unroll.service.engine.cuda.layout import buckets
from unroll.service.engine.cuda.parts import Layer, NotSeparable, Segment
from unroll.service.engine.cuda.step_call import GATHER
from unroll.service.engine.engine import DeviceFailed, Engine
from unroll.service.engine.host_engine import HostEngine
from unroll.service.engine.proof import Proof, prove_steps
from unroll.service.engine.runner import DeviceUnavailable, Runner, to_float16

_log = structlog.get_logger(__name__)

#: Mantissa bits lost relative to float32; the tolerated difference from PyTorch grows accordingly.
_BITS_LOST: dict[Precision, int] = {"float32": 0, "tf32": 13, "float16": 13}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How models run on a device.

    Attributes:
        threads: onnxruntime's threads for one call, on the host.
        precision: Precision of matrix products, on a GPU.
        buckets: Row counts of the captured single-step calls, on a GPU; () for the defaults.
        cells: Implementation of LSTM and GRU layers in single steps, on a GPU.
        memory_share: Share of the free memory that a model's state rows may take.
    """

    threads: int = 1
    precision: Precision = "float32"
    buckets: tuple[int, ...] = ()
    cells: Cells = "fused"
    memory_share: float = 0.5

    def check(self, device: str) -> None:
        """Raises ValueError if no model can run on the device with these options."""
        if device == "cpu" and self.precision != "float32":
            raise ValueError(f"precision {self.precision} needs a GPU; the CPU uses float32")


class InsufficientMemory(Exception):
    """The state rows do not fit in the device's memory."""


class HostBackend:
    """One model on the host; `CudaBackend` is the equivalent for a GPU.

    slack: Factor on the manifest's tolerance.
    """

    slack = 1.0

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self._manifest, self._golden, self._options = bundle.manifest, bundle.golden, options
        self.runner = Runner(bundle.model, bundle.manifest, threads=options.threads)

    def max_sessions(self, row_bytes: int, host_bytes: int) -> int:
        """Return how many sessions fit in the allowed share of the free memory.

        Args:
            row_bytes: A session's state row.
            host_bytes: A session's other memory, on the host.
        """
        return int(self._options.memory_share * host_memory()[1] / (row_bytes + host_bytes))

    def create_engine(self, rows: int, max_batch: int) -> tuple[Engine, Proof]:
        """Create an engine and prove it with the golden vectors.

        Raises:
            InsufficientMemory: The state rows do not fit.
            GoldenMismatch: The engine's answers are wrong.
            ValueError: The largest bucket has fewer than `max_batch` rows.
        """
        engine = HostEngine(self.runner, self._manifest, rows)
        sizes = (1, min(max_batch, len(self._golden.state))) if self._manifest.streamable else ()
        return engine, prove_steps(engine, self._manifest, self._golden, sizes, rows, self.slack)


class CudaBackend:
    def __init__(self, bundle: Bundle, device: Device, options: EngineOptions) -> None:
        self._bundle, self._manifest, self._options = bundle, bundle.manifest, options
        self.device = device
        self.slack = 2.0 ** _BITS_LOST[options.precision]
        self._tf32 = options.precision == "tf32"
        model = to_float16(bundle.model) if options.precision == "float16" else bundle.model
        self.runner = Runner(model, self._manifest, device.name, stream=device.stream, tf32=self._tf32)

    def max_sessions(self, row_bytes: int, host_bytes: int) -> int:
        share = self._options.memory_share
        return int(share * min(self.device.free_bytes() / row_bytes, host_memory()[1] / host_bytes))

    def create_engine(self, rows: int, max_batch: int) -> tuple[CudaEngine, Proof]:
        sizes = buckets(self._options.buckets, max_batch) if self._manifest.streamable else ()
        parts = self._parts() if sizes and self._options.cells == "fused" else []
        if parts:
            try:
                return self._proven(rows, sizes, parts)
            except (CompilationFailed, GoldenMismatch) as error:
                self._fall_back(str(error))
        return self._proven(rows, sizes, [])

    def _proven(self, rows: int, sizes: tuple[int, ...], parts: list[Layer | Segment]) -> tuple[CudaEngine, Proof]:
        """Create an engine and prove it. Frees the device's memory if that fails."""
        try:
            engine = CudaEngine(self.device, self.runner, self._manifest, rows, sizes, parts, tf32=self._tf32)
            return engine, prove_steps(engine, self._manifest, self._bundle.golden, sizes, rows, self.slack)
        except OutOfDeviceMemory as error:
            self.device.close()
            raise InsufficientMemory(
                f"{rows} state rows do not fit: {error}; lower --session-capacity or set it to auto"
            ) from error
        except (CompilationFailed, GoldenMismatch):
            self.device.close()
            raise

    def _parts(self) -> list[Layer | Segment]:
        """Split the graph for kernels of our own. Empty if onnxruntime must run the whole model."""
        if "float16" in {self._options.precision, self._manifest.precision}:
            return []
        try:
            from unroll.service.engine.cuda.step_graph import take_apart  # needs `onnx`

            return take_apart(self._bundle.model, self._manifest)
        except (ImportError, NotSeparable) as error:
            self._fall_back(str(error))
            return []

    def _fall_back(self, reason: str) -> None:
        name = f"{self._manifest.name}:{self._manifest.version}"
        _log.warning("onnxruntime runs the recurrent layers", model=name, device=self.device.name, reason=reason)


DeviceBackend = HostBackend | CudaBackend


def open_backend(bundle: Bundle, device: str, options: EngineOptions) -> DeviceBackend:
    """Load a model on a device.

    Args:
        device: `cpu` or `cuda:N`.

    Raises:
        DeviceUnavailable: The device cannot be used.
        ValueError: The model cannot be loaded there.
    """
    options.check(device)
    if device == "cpu":
        return HostBackend(bundle, options)
    own = bundle.manifest.precision
    if own == "int8":
        raise ValueError("it was exported in int8, which is for the CPU: use --device cpu")
    if own != "float32" and options.precision != "float32":
        raise ValueError(f"it was exported in {own} already: omit --precision")
    return CudaBackend(bundle, open_cuda(device), options)


def open_cuda(device: str) -> Device:
    """Open a GPU.

    Args:
        device: `cuda:N`.

    Raises:
        DeviceUnavailable: The GPU or a library for it is missing.
    """
    try:
        from unroll.service.engine.cuda.driver import Cuda  # a machine without a GPU may lack the bindings
    except ImportError as error:
        raise DeviceUnavailable(
            f"{device} needs NVIDIA's Python bindings (pip install cuda-bindings): {error}"
        ) from error
    try:
        opened = Cuda(int(device.partition(":")[2]))
        opened.prepare(GATHER)
        return opened
    except (CompilationFailed, DeviceFailed, RuntimeError) as error:  # RuntimeError: the bindings cannot find a library
        raise DeviceUnavailable(f"{device} cannot be used: {error}") from error
