"""Encodes replies to infer calls; the parts that depend only on the request's header are computed once."""

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from unroll.bundle import TensorSpec
from unroll.service.api.request import JSON, RAW, Answer, json_answer
from unroll.service.core.errors import InvalidRequest
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json, open_inference
from unroll.service.protocol.open_inference import InferHeader
from unroll.service.protocol.tensors import Codec


class ReplyPlan:
    """Encodes the replies to requests with the same header, on one version of a model.

    Raises InvalidRequest if the header requests an output that the model does not have.
    """

    def __init__(self, served: ServedModel, name: str, header: InferHeader) -> None:
        self.manifest = served.manifest
        self._selected = _selected_outputs(served, header)
        self._head: dict[str, Any] = {"model_name": name, "model_version": served.version}
        self._binary = all(binary for _, _, binary in self._selected)
        self._shapes: list[tuple[int, ...]] = []
        self._form = b""  # JSON template of replies to sequences, with outputs of these shapes

    def encode(self, request_id: str | None, outputs: Tensors, position: int | None = None) -> Answer:
        """Encode a reply.

        Args:
            request_id: The client's id of the request, if any.
            outputs: All outputs of the model, each (batch, time, *shape), or (batch, *shape) without time.
            position: Position of the sequence after the step; None for whole sequences.
        """
        if position is not None and self._binary:
            return self.encode_row(request_id, self.rows(outputs)[0], position)
        head = self._head if request_id is None else {**self._head, "id": request_id}
        if position is not None:
            head = {**head, "parameters": {"sequence_position": position}}
        return _answer(head, [(spec, outputs[i], binary) for i, spec, binary in self._selected])

    def rows(self, outputs: Tensors) -> list[tuple[bytes, ...]]:
        """Encode the outputs once for several replies, one per row; `encode_row` completes each."""
        shapes = [(1, *outputs[i].shape[1:]) for i, _, _ in self._selected]
        if shapes != self._shapes:
            self._shapes, self._form = shapes, self._form_of(shapes)
        tensors = [outputs[i] for i, _, binary in self._selected if binary]
        data = [outputs[i].reshape(len(outputs[i]), -1) for i, _, binary in self._selected if not binary]
        contents = Codec.rows_to_raw(tensors) if tensors else repeat(b"")
        return [*zip(repeat(self._form, len(outputs[0])), contents, *map(json.dump_rows, data), strict=False)]

    def encode_row(self, request_id: str | None, row: tuple[bytes, ...], position: int) -> Answer:
        """Encode the reply to a step of a sequence. row: its element of `rows`."""
        form, tensors, *data = row
        own = b"" if request_id is None else b',"id":' + json.dump(request_id)
        answer = Answer(200, RAW if tensors else JSON, tensors)
        answer.put_first(form % (own, position, *data))
        return answer

    def _form_of(self, shapes: Sequence[tuple[int, ...]]) -> bytes:
        """A JSON template with placeholders for the id, the position and the data."""
        entries = []
        for (_, spec, binary), shape in zip(self._selected, shapes, strict=True):
            entry = _opened({"name": spec.name, "datatype": open_inference.DATATYPES[spec.dtype], "shape": shape})
            size = math.prod(shape) * spec.numpy.itemsize
            entries.append(entry + (b',"parameters":{"binary_data_size":%d}}' % size if binary else b',"data":%b}'))
        outputs, parameters = b',"outputs":[%b]' % b",".join(entries), b',"parameters":{"sequence_position":%d}'
        members = outputs + parameters if self._binary else parameters + outputs
        return _opened(self._head) + b"%b" + members + b"}"


def _opened(document: dict[str, Any]) -> bytes:
    """The start of a JSON object in a template, to which members can be added."""
    return json.dump(document)[:-1].replace(b"%", b"%%")


def _answer(head: dict, outputs: list[tuple[TensorSpec, np.ndarray, bool]]) -> Answer:
    document, binary = open_inference.describe(head, outputs)
    return json_answer(document, sum(array.size for _, array, as_binary in outputs if not as_binary), tensors=binary)


def _selected_outputs(served: ServedModel, header: InferHeader) -> list[tuple[int, TensorSpec, bool]]:
    """Per selected output: its index in the model's outputs, its spec, and whether to send it as binary."""
    available = {spec.name: (i, spec) for i, spec in enumerate(served.manifest.outputs)}
    selected = header.outputs or tuple((name, header.binary_output) for name in available)
    if unknown := {name for name, _ in selected} - available.keys():
        raise InvalidRequest(f"outputs {sorted(unknown)} are not among {sorted(available)}")
    return [(*available[name], binary) for name, binary in selected]
