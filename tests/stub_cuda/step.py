"""For scripts that run over the stub: a session on device memory, called as an engine would.

Not for the tests' own process, which has no stub.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}

cuda = ctypes.CDLL("libcudart.so.13")


def phase(name: str) -> None:
    """Begin a phase, to which all later calls belong."""
    cuda.stub_mark(name.encode())


def new_stream() -> int:
    stream = ctypes.c_void_p()
    cuda.cudaStreamCreate(ctypes.byref(stream))
    return stream.value or 0


class Step:
    """One time step of `rows` rows. Raises if a node is not on CUDA, unless `fallback`.

    stream: replaces onnxruntime's own. options: of the CUDA provider.
    """

    def __init__(
        self, model: str | Path, rows: int = 4, stream: int = 0, *, fallback: bool = False, **options: str
    ) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if fallback else "1")
        if stream:
            options["user_compute_stream"] = str(stream)
        self.stream = ctypes.c_void_p(stream)
        self._kept: list[ort.IOBinding] = []
        self.session = ort.InferenceSession(str(model), settings, providers=[("CUDAExecutionProvider", options)])
        self.use(rows)

    def use(self, rows: int, steps: int = 1) -> None:
        """Bind tensors of that size from now on. Earlier ones stay alive, because a graph may refer to them."""
        self.binding = self.session.io_binding()
        self._kept.append(self.binding)
        for node in self.session.get_inputs():
            value = np.ones(_shape(node, rows, steps), _TYPES[node.type])
            place = "cpu" if node.name == "sequence_lens" else "cuda"  # at the location the graph requires
            self.binding.bind_ortvalue_input(node.name, ort.OrtValue.ortvalue_from_numpy(value, place, 0))
        for node in self.session.get_outputs():
            shape = _shape(node, rows, steps)
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, _TYPES[node.type], "cuda", 0)
            self.binding.bind_ortvalue_output(node.name, value)

    def run(self, *, wait: bool = True, graph: int | None = None) -> None:
        """Run the step. graph: The number of onnxruntime's own graph, -1 for none."""
        options = ort.RunOptions()
        if not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        self.session.run_with_iobinding(self.binding, options)

    def capture(self, *, wait: bool = False) -> Any:
        """Capture a graph around a run, as the owner of the stream would."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.cudaStreamBeginCapture(self.stream, 0)
        try:
            self.run(wait=wait)
        finally:
            cuda.cudaStreamEndCapture(self.stream, ctypes.byref(graph))
        cuda.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return executable

    def launch(self, graph: Any) -> None:
        cuda.cudaGraphLaunch(graph, self.stream)


def _shape(node: Any, rows: int, steps: int) -> list[int]:
    """The shape of a bundle's tensor: (batch, time, ...) or (batch, ...)."""
    given = iter((rows, steps))
    return [next(given) if isinstance(size, str) else size for size in node.shape]
