"""The operations on models: descriptions and whole sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unroll.client.errors import InvalidInput
from unroll.client.exchange import RAW, Exchange, Request, Response, model_path, post_json
from unroll.client.tensors import ArrayLike, Arrays, Model, listed


class Catalogue:
    """Caches model descriptions: that of a version never changes."""

    def __init__(self) -> None:
        self._versions: dict[tuple[str, str], Model] = {}

    def models(self) -> Exchange[list[Model]]:
        response = yield Request("GET", "/v1/models")
        return [self._add(response, document) for document in response.checked().json()]

    def model(self, reference: str) -> Exchange[Model]:
        """Look up `name` or `name:version`. Raises ModelUnknown or ModelUnavailable."""
        name, _, version = reference.partition(":")
        if (known := self._versions.get((name, version))) is not None:
            return known
        response = yield Request("GET", model_path(reference))
        return self._add(response, response.checked().json())

    def _add(self, response: Response, document: dict[str, Any]) -> Model:
        try:
            model = Model.from_json(document)
        except (KeyError, TypeError) as error:
            raise response.foreign() from error
        known = self._versions.get((model.name, model.version))
        if known is None or known.digest != model.digest:
            known = self._versions[model.name, model.version] = model
        return known


def sequence(model: Model, inputs: ArrayLike, static: Mapping[str, ArrayLike] | None = None) -> Exchange[Arrays]:
    """Run a whole sequence, `inputs` (T, *shape), from the model's initial state.

    Raises:
        InvalidInput: An array does not fit; nothing was sent.
        ServerError: The server refused the request.
    """
    arrays = model.inputs_of(inputs, "T")
    first = model.static_of(static)
    steps = len(arrays[0])
    path = f"{model_path(f'{model.name}:{model.version}')}/sequences"
    if first is None:
        headers = {"Content-Type": RAW, "Unroll-Steps": str(steps)}
        response = yield Request("POST", path, b"".join(array.tobytes() for array in arrays), headers)
        return model.outputs_of(split_outputs(model, response.checked(), response.body, steps))
    named = {spec.name: [array.tolist()] for spec, array in zip(model.inputs, arrays, strict=True)}
    document = {"inputs": named, "static": {name: [value] for name, value in first.items()}}
    response = yield post_json(path, document)
    several = listed(model.outputs, response.checked().json()["outputs"])
    return model.outputs_of([np.array(rows[0], spec.numpy) for spec, rows in zip(model.outputs, several, strict=True)])


def split_outputs(model: Model, response: Response, content: bytes | memoryview, steps: int) -> list[np.ndarray]:
    """Split a raw body into the outputs, each (T, *shape), or (*shape) without a time axis.

    Raises:
        ServerError: The body does not have the size of this model's outputs.
    """
    sizes = [spec.size * (steps if spec.time else 1) * spec.numpy.itemsize for spec in model.outputs]
    if len(content) != sum(sizes):
        raise response.foreign()
    arrays, begin = [], 0
    for spec in model.outputs:
        shape = (steps, *spec.shape) if spec.time else spec.shape
        count = spec.size * (steps if spec.time else 1)
        arrays.append(np.frombuffer(content, spec.numpy, count, begin).reshape(shape).copy())
        begin += count * spec.numpy.itemsize
    return arrays


def check_sequences(sequences: Sequence[Any], static: Sequence[Any] | None) -> list[Any]:
    """The static inputs of each sequence, or None. Raises InvalidInput if the numbers differ."""
    if static is not None and len(static) != len(sequences):
        raise InvalidInput(f"{len(sequences)} sequences were given, and static inputs for {len(static)}")
    return [None] * len(sequences) if static is None else list(static)
