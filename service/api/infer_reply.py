"""Encodes the replies to infer calls; what depends on the request's header alone is computed once."""

import numpy as np

from unroll.bundle import TensorSpec
from unroll.service.api.request import RAW, Answer, json_answer
from unroll.service.core.errors import InvalidRequest
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import open_inference
from unroll.service.protocol.open_inference import InferHeader


class ReplyPlan:
    """The form of the replies to requests with one header, on one version of a model.

    Raises InvalidRequest if the header requests an output that the model does not have.
    """

    def __init__(self, served: ServedModel, name: str, header: InferHeader) -> None:
        self.manifest = served.manifest
        self._selected = _selected_outputs(served, header)  # each with whether it is sent as binary
        self._head: dict = {"model_name": name, "model_version": served.version}
        if header.id is not None:
            self._head["id"] = header.id
        self._binary = all(binary for _, binary in self._selected)
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._json = b"", b""  # of a reply with these shapes, before and after the position

    def encode(self, outputs: Tensors, position: int | None = None) -> Answer:
        """The reply.

        Args:
            outputs: All of the model's, each (batch, time, *shape), or (batch, *shape) without time.
            position: Of the sequence after the step; None for whole sequences.
        """
        arrays = dict(zip((spec.name for spec in self.manifest.outputs), outputs, strict=True))
        if position is None or not self._binary:
            head = self._head if position is None else {**self._head, "parameters": {"sequence_position": position}}
            return _answer(head, [(spec, arrays[spec.name], binary) for spec, binary in self._selected])
        selected = [arrays[spec.name] for spec, _ in self._selected]
        shapes = tuple([array.shape for array in selected])
        if shapes != self._shapes:
            self._shapes, self._json = shapes, self._split_json(selected)
        text = b"%b%d%b" % (self._json[0], position, self._json[1])
        fields = b"inference-header-content-length: %d\r\n" % len(text)
        return Answer(200, RAW, b"".join([text, *[array.tobytes() for array in selected]]), fields)

    def _split_json(self, arrays: list[np.ndarray]) -> tuple[bytes, bytes]:
        """The JSON of a reply, split where the position belongs: it is the last member."""
        entries = [(spec, array, True) for (spec, _), array in zip(self._selected, arrays, strict=True)]
        body, length = open_inference.encode({**self._head}, entries)
        return body[: (length or 1) - 1] + b',"parameters":{"sequence_position":', b"}}"


def _answer(head: dict, outputs: list[tuple[TensorSpec, np.ndarray, bool]]) -> Answer:
    document, binary = open_inference.describe(head, outputs)
    return json_answer(document, sum(array.size for _, array, as_binary in outputs if not as_binary), tensors=binary)


def _selected_outputs(served: ServedModel, header: InferHeader) -> list[tuple[TensorSpec, bool]]:
    available = {spec.name: spec for spec in served.manifest.outputs}
    selected = header.outputs or tuple((name, header.binary_output) for name in available)
    if unknown := {name for name, _ in selected} - available.keys():
        raise InvalidRequest(f"outputs {sorted(unknown)} are not among {sorted(available)}")
    return [(available[name], binary) for name, binary in selected]
