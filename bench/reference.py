"""Expected answers: onnxruntime over a session's whole input in one call, without a server; and PyTorch's."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bench import inputs
from bench.servers import ROOT

#: Largest absolute difference between a peer's outputs and PyTorch's.
TOLERANCE = 1e-5
_EXPORT_SECONDS = 300


def export(repository: Path, *which: str) -> None:
    """Run `python -m bench.model` with these arguments."""
    command = [sys.executable, "-m", "bench.model", str(repository), *which]
    subprocess.run(command, check=True, timeout=_EXPORT_SECONDS, cwd=ROOT)


def runner(model: Path) -> ort.InferenceSession:
    """A session with one thread that does not spin, as in `unroll serve`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class Reference:
    """The reference for a model in a repository that bench.model wrote."""

    def __init__(self, name: str, repository: Path) -> None:
        self.name = name
        self.path = repository / name / "1" / "model.onnx"
        self.features = (inputs.MODELS | inputs.LARGE)[name].features
        self.rows = inputs.rows(self.features)
        self._runner = runner(self.path)
        self._state_size: int = next(node.shape[-1] for node in self._runner.get_inputs() if node.name == "state")
        with np.load(repository.parent / f"{name}-torch.npz") as outputs:
            self._torch = {key: outputs[key] for key in outputs.files}
        self.sequences = lru_cache(lambda length: inputs.sequences(self.features, length))

    def outputs(self, x: np.ndarray) -> np.ndarray:
        """Outputs of a session that starts from the initial state. x and result: (steps, features)."""
        state = np.zeros((1, self._state_size), np.float32)
        feeds = {"x": x[None], "state": state, "sequence_lens": np.array([len(x)], np.int32)}
        y: np.ndarray = self._runner.run(["y"], feeds)[0]
        return y[0]

    def last(self, session: int, steps: int) -> np.ndarray:
        """The output of step number `steps` of a session that sends its rows cyclically: (features,)."""
        return self.outputs(self.rows[session][np.arange(steps) % inputs.ROWS])[-1]

    def torch_last(self, session: int, steps: int) -> np.ndarray | None:
        """As `last`, but from PyTorch; None if bench.model did not write it."""
        known = session < inputs.TORCH_SESSIONS and steps <= inputs.ROWS
        return self._torch["rows"][session, steps - 1] if known else None

    def sequence(self, number: int, length: int) -> np.ndarray:
        """Outputs of one of `sequences(length)`: (length, features)."""
        return self.outputs(self.sequences(length)[number])

    def torch_sequence(self, number: int, length: int) -> np.ndarray:
        return self._torch[str(length)][number]
