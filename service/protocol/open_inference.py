"""The infer call of the Open Inference Protocol: its JSON, and the tensors in the JSON or after it.

Follows the protocol's REST specification and Triton's sequence and binary-tensor extensions.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from unroll.bundle import TensorSpec
from unroll.service.core.errors import InvalidDtype, InvalidRequest, InvalidShape
from unroll.service.protocol import json
from unroll.service.protocol.tensors import dtype_hint, from_bytes, numbers, pack

#: Matches JSON strings (without quotes) that need no escapes.
_PLAIN = re.compile(rb"[ !#-\[\]-~]*").fullmatch
#: Maximum size of a header to cache.
_KEPT_BYTES = 1024

DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}

_MAX_ELEMENTS = 2**31


@dataclass(slots=True)
class SequenceParameters:
    """The sequence parameters. position: `sequence_position`, an extension of ours."""

    id: str
    start: bool
    end: bool
    position: int | None


@dataclass(slots=True, eq=False)
class InferHeader:
    """The part of the JSON that a client's requests repeat.

    Attributes:
        timeout: Seconds.
        outputs: (name, as binary) of the outputs to return; None for all.
        binary_output: Default of "as binary".
        layout: Cached layout of the binary inputs, from the last read.
        data_step: Set if the only input was one time step in the JSON.
        plan: Cached plan of the reply; owned by the caller.
    """

    timeout: float | None
    outputs: tuple[tuple[str, bool], ...] | None
    binary_output: bool
    layout: "BinaryLayout | None" = None
    data_step: TensorSpec | None = None
    plan: Any = None


@dataclass(slots=True, eq=False)
class InferRequest:
    """A request.

    Attributes:
        inputs: The JSON entries, which `read_inputs` converts to arrays.
        binary: The bytes after the JSON.
    """

    header: InferHeader
    id: str | None
    sequence: SequenceParameters | None
    inputs: list[dict[str, Any]]
    binary: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class BinaryLayout:
    """The places of the inputs in the `size` bytes after the JSON.

    tensors: spec, shape and offset of each input. step: slices of the inputs, if they are one time step.
    """

    specs: Sequence[TensorSpec]
    tensors: tuple[tuple[TensorSpec, tuple[int, ...], int], ...]
    size: int
    step: tuple[slice, ...]


def parse(body: bytes, header_length: int | None, json_limit: int) -> InferRequest:
    """Parse a body. header_length: value of `Inference-Header-Content-Length`, None if absent.

    Raises InvalidRequest.
    """
    if header_length is None:
        header_length = len(body)
    if not 0 < header_length <= len(body):
        raise InvalidRequest(f"Inference-Header-Content-Length is {header_length}; the body has {len(body)} bytes")
    return read(json.parse_object(body[:header_length], json_limit), memoryview(body)[header_length:])


def read(document: dict[str, Any], binary: memoryview) -> InferRequest:
    """Build a request from parsed JSON. Raises InvalidRequest."""
    parameters = _parameters(document)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequest("'id' must be a string")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(item, dict) for item in inputs):
        raise InvalidRequest("'inputs' must be a list of objects")
    binary_output = _flag(parameters, "binary_data_output")
    sequence = _sequence(parameters)
    outputs, timeout = document.get("outputs"), parameters.get("timeout")
    tensors = [{**item, "data": None} if "data" in item else item for item in inputs]
    try:
        repeated = json.dump((tensors, outputs, timeout, binary_output))
    except TypeError:  # nested too deeply to be written, though not to be read
        header = _header(outputs, timeout, binary_output)
    else:
        header = (_kept_header if len(repeated) <= _KEPT_BYTES else _written_header)(repeated)
    return InferRequest(header, request_id, sequence, inputs, binary)


def _header(outputs: Any, timeout: Any, binary_output: bool) -> InferHeader:
    seconds = _timeout({"timeout": timeout})
    return InferHeader(seconds, _requested(outputs, binary_output), binary_output)


def _written_header(repeated: bytes) -> InferHeader:
    return _header(*orjson.loads(repeated)[1:])


_kept_header = functools.lru_cache(maxsize=2048)(_written_header)


class RepeatedText:
    """Remembers the last JSON, and skips parsing if it repeats before tensors, possibly with another id."""

    __slots__ = ("_after", "_before", "_request")

    def __init__(self) -> None:
        self._request: InferRequest | None = None
        self._before = self._after = b""  # the text around the id; all is before if the id may not vary

    def parse(self, body: bytes, header_length: int | None, json_limit: int) -> InferRequest:
        """Like the function `parse`. The request is valid until the next call."""
        last, begin = self._request, len(self._before)
        if last is not None and last.binary.obj is body:
            return last
        if last is not None and header_length is not None and begin <= header_length - len(self._after):
            own = body[begin : header_length - len(self._after)]
            if (
                body.startswith(self._before)
                and body.startswith(self._after, begin + len(own))
                and (_PLAIN(own) if self._after else not own)
                and header_length <= min(len(body), json_limit)
            ):
                if self._after:
                    last.id = own.decode()
                last.binary = memoryview(body)[header_length:]
                return last
        request = self._request = parse(body, header_length, json_limit)
        self._before, self._after = body[:header_length], b""
        if header_length is not None and last is not None and request.sequence == last.sequence:
            self._find_id(request)
        return request

    def _find_id(self, request: InferRequest) -> None:
        """Find the place of the id in the text, and verify it by parsing with another id."""
        before, found, after = self._before.partition(json.dump(request.id))
        trial = b'%b"0"%b' % (before, after)
        if found and request.id not in (None, "0") and parse(trial, None, len(trial)).id == "0":
            self._before, self._after = before + b'"', b'"' + after


def read_inputs(request: InferRequest, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
    """The inputs in the order of `specs`, each (batch, time, *shape), with equal batch and time.

    Raises InvalidRequest, InvalidShape or InvalidDtype.
    """
    binary, layout = request.binary, request.header.layout
    if layout is not None and layout.specs is specs and layout.size == len(binary):
        return [from_bytes(spec, binary[offset:], shape) for spec, shape, offset in layout.tensors]
    by_name = {spec.name: spec for spec in specs}
    arrays: dict[str, np.ndarray] = {}
    offsets: dict[str, int] = {}
    for item in request.inputs:
        name = item.get("name")
        spec = by_name.get(name) if isinstance(name, str) else None
        if spec is None or name in arrays:
            raise InvalidRequest(f"input {name!r} is not one of {sorted(by_name)}, or is repeated")
        array, used = _tensor(spec, item, binary)
        arrays[spec.name] = array
        if used:
            offsets[spec.name] = len(request.binary) - len(binary)
        binary = binary[used:]
    if missing := by_name.keys() - arrays.keys():
        raise InvalidRequest(f"inputs are missing: {sorted(missing)}")
    if binary:
        raise InvalidRequest(f"{len(binary)} bytes follow the last tensor")
    if len({array.shape[:2] for array in arrays.values()}) > 1:
        raise InvalidShape("the inputs differ in batch or time")
    is_step = arrays[specs[0].name].shape[:2] == (1, 1)
    if len(offsets) == len(specs):
        tensors = tuple((spec, arrays[spec.name].shape, offsets[spec.name]) for spec in specs)
        places = tuple(slice(offset, offset + spec.nbytes) for spec, _, offset in tensors) if is_step else ()
        request.header.layout = BinaryLayout(specs, tensors, len(request.binary), places)
    elif len(specs) == 1 and is_step:
        request.header.data_step = specs[0]
    return [arrays[spec.name] for spec in specs]


def read_step(request: InferRequest, specs: Sequence[TensorSpec]) -> bytes | None:
    """The concatenated inputs of one time step, unchecked; None unless the last `read_inputs` had the same layout."""
    header, binary = request.header, request.binary
    if (layout := header.layout) is not None:
        if layout.specs is not specs or layout.size != len(binary) or not layout.step:
            return None
        return b"".join([binary[place] for place in layout.step])
    if header.data_step is not specs[0] or binary:
        return None
    return pack(specs[0], request.inputs[0]["data"])


def describe(
    head: dict[str, Any], outputs: Sequence[tuple[TensorSpec, np.ndarray, bool]]
) -> tuple[dict[str, Any], bytes]:
    """The JSON document of a response, and the tensors that follow it. outputs: (spec, array, as binary)."""
    entries: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for spec, array, as_binary in outputs:
        entry: dict[str, Any] = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": array.shape}
        if as_binary:
            content = array.tobytes()
            binary.append(content)
            entry["parameters"] = {"binary_data_size": len(content)}
        else:
            entry["data"] = np.ascontiguousarray(array).reshape(-1)
        entries.append(entry)
    return {**head, "outputs": entries}, b"".join(binary)


def _parameters(parent: dict[str, Any]) -> dict[str, Any]:
    value = parent.get("parameters", {})
    if not isinstance(value, dict):
        raise InvalidRequest("'parameters' must be an object")
    return value


def _flag(parameters: dict[str, Any], key: str) -> bool:
    value = parameters.get(key, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter {key!r} must be true or false")
    return value


def _whole(parameters: dict[str, Any], key: str) -> int | None:
    value = parameters.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"parameter {key!r} must be a whole number, 0 or more")
    return value


def _sequence(parameters: dict[str, Any]) -> SequenceParameters | None:
    value = parameters.get("sequence_id", 0)
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
        raise InvalidRequest("parameter 'sequence_id' must be an unsigned integer or a string")
    start, end = _flag(parameters, "sequence_start"), _flag(parameters, "sequence_end")
    position = _whole(parameters, "sequence_position")
    if value in (0, ""):  # the protocol's values for "no sequence"
        if start or end or position is not None:
            raise InvalidRequest("sequence parameters were sent without a sequence_id")
        return None
    return SequenceParameters(str(value), start, end, position)


def _timeout(parameters: dict[str, Any]) -> float | None:
    microseconds = _whole(parameters, "timeout")
    return microseconds / 1e6 if microseconds else None


def _requested(outputs: Any, binary_by_default: bool) -> tuple[tuple[str, bool], ...] | None:
    if outputs is None or outputs == []:
        return None
    if not isinstance(outputs, list) or not all(
        isinstance(o, dict) and isinstance(o.get("name"), str) for o in outputs
    ):
        raise InvalidRequest("'outputs' must be a list of objects with a 'name'")
    requested = []
    for output in outputs:
        parameters = _parameters(output)
        _refuse_shared_memory(f"output {output['name']!r}", parameters)
        if "classification" in parameters:
            raise InvalidRequest("the classification extension is not supported: request the output, and sort it")
        binary = _flag(parameters, "binary_data") if "binary_data" in parameters else binary_by_default
        requested.append((output["name"], binary))
    if len({name for name, _ in requested}) < len(requested):
        raise InvalidRequest("an output is requested twice")
    return tuple(requested)


def _refuse_shared_memory(tensor: str, parameters: dict[str, Any]) -> None:
    if any(key.startswith("shared_memory_") for key in parameters):
        raise InvalidRequest(
            f"{tensor} uses shared memory, which this server does not support, because it would let clients access the "
            "machine's memory; send tensors in the request and the response"
        )


def _tensor(spec: TensorSpec, item: dict[str, Any], binary: memoryview) -> tuple[np.ndarray, int]:
    """One input tensor (batch, time, *shape), and the number of binary bytes that it uses."""
    if item.get("datatype") != DATATYPES[spec.dtype]:
        raise InvalidDtype(f"input {spec.name!r} is {DATATYPES[spec.dtype]}, not {item.get('datatype')!r}")
    shape = item.get("shape")
    if not isinstance(shape, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in shape):
        raise InvalidShape(f"the shape of input {spec.name!r} must be a list of whole numbers")
    expected = f"[batch, time{''.join(f', {n}' for n in spec.shape)}]"
    if len(shape) != 2 + len(spec.shape) or tuple(shape[2:]) != spec.shape or min(shape) < 1:
        raise InvalidShape(f"input {spec.name!r} must have the shape {expected}, not {shape}")
    if (elements := math.prod(shape)) > _MAX_ELEMENTS:
        raise InvalidShape(f"input {spec.name!r} is too large")
    parameters = _parameters(item)
    _refuse_shared_memory(f"input {spec.name!r}", parameters)
    size = _whole(parameters, "binary_data_size")
    if size is not None:
        if "data" in item:
            raise InvalidRequest(f"input {spec.name!r} has both data and binary_data_size")
        needed = elements * spec.numpy.itemsize
        if size != needed or size > len(binary):
            raise InvalidShape(
                f"input {spec.name!r} of shape {shape} needs {needed} bytes; binary_data_size is {size}, "
                f"and {len(binary)} bytes were sent{dtype_hint(spec, size, needed, 1)}"
            )
        return from_bytes(spec, binary[:size], tuple(shape)), size
    return _from_json(spec, item.get("data"), shape, elements), 0


def _from_json(spec: TensorSpec, data: Any, shape: list[int], elements: int) -> np.ndarray:
    array = numbers(spec, data)
    if array.size != elements or (array.ndim > 1 and list(array.shape) != shape):
        raise InvalidShape(f"the data of input {spec.name!r} does not fill its shape {shape}")
    return array.reshape(shape)
