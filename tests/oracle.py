"""Computes the correct outputs of a session: its whole sequence in one onnxruntime call."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from unroll.bundle import Manifest


class Oracle:
    """One version of a model, run by plain onnxruntime without chunking."""

    def __init__(self, repository: Path, name: str, version: str = "1") -> None:
        folder = repository / name / version
        self.manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self.manifest.outputs]

    def all(self, *inputs: np.ndarray, state: np.ndarray | None = None) -> tuple[list[np.ndarray], np.ndarray]:
        """Run inputs, each (time, *shape); return the outputs without a batch axis, and the final state row."""
        feed = {spec.name: array[np.newaxis] for spec, array in zip(self.manifest.inputs, inputs, strict=True)}
        row = self.manifest.initial_row() if state is None else state
        lens = np.array([len(inputs[0])], np.int32)
        *outputs, state_out = self._session.run(
            [*self._names, "state_out"], {**feed, "state": row[np.newaxis], "sequence_lens": lens}
        )
        return [output[0] for output in outputs], state_out[0]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """Return the first output for the whole sequence."""
        return self.all(*inputs)[0][0]
