"""The model.py of Triton's Python backend: one call of onnxruntime for a whole batch, the states in one array.

Without a sequence batcher every request is a whole sequence from a zero state. What Triton knows of a sequence is read
from the request itself, which costs less than control tensors.
"""

import json
import os
import sys
from typing import Any

sys.path.insert(0, os.environ["BENCH_SITE_PACKAGES"])

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton

#: As many as Triton lets be open, and one for the places of a batch that `direct` fills with nothing.
_SLOTS = 1024
_NO_ONE = _SLOTS


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        batching = config.get("sequence_batching", {})
        self._stateful = bool(batching)
        self._has_places = "direct" in batching
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = config["parameters"]["model"]["string_value"]
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._state_size = next(node.shape[1] for node in self._session.get_inputs() if node.name == "state")
        self._states = np.zeros((_SLOTS + 1, self._state_size), np.float32)
        self._free = list(range(_SLOTS))
        self._slots: dict[int, int] = {}

    def execute(self, requests: list) -> list:
        """At most one request of each sequence. They are of equal length, or Triton would not batch them."""
        x = np.concatenate([triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests])
        lens = np.full(len(x), x.shape[1], np.int32)
        slots = [self._slot(request) for request in requests] if self._stateful else None
        state = np.zeros((len(x), self._state_size), np.float32) if slots is None else self._states[slots]
        y, after = self._session.run(["y", "state_out"], {"x": x, "state": state, "sequence_lens": lens})
        if slots is not None:
            self._states[slots] = after
            self._end(requests, slots)
        return [triton.InferenceResponse([triton.Tensor("y", row[None])]) for row in y]

    def _slot(self, request: Any) -> int:
        if self._has_places and not triton.get_input_tensor_by_name(request, "READY").as_numpy()[0, 0]:
            return _NO_ONE
        sequence = request.correlation_id()
        if request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            if sequence not in self._slots:
                self._slots[sequence] = self._free.pop()
            self._states[self._slots[sequence]] = 0.0
        return self._slots[sequence]

    def _end(self, requests: list, slots: list[int]) -> None:
        for request, slot in zip(requests, slots, strict=True):
            if slot != _NO_ONE and request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                self._free.append(self._slots.pop(request.correlation_id()))
