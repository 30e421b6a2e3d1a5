"""The Open Inference Protocol by hand: requests as bytes, for what no client library can be made to send."""

import json
from dataclasses import dataclass

import httpx
import numpy as np

HEADER_LENGTH = "Inference-Header-Content-Length"

_DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


@dataclass(frozen=True)
class Body:
    content: bytes
    headers: dict[str, str]


def body(inputs: dict[str, np.ndarray], *, binary: bool = True, id: str | None = None, **parameters: object) -> Body:
    """inputs: by name, each (batch, time, *shape). Binary tensors come back as binary tensors."""
    document: dict = {"inputs": []}
    if id is not None:
        document["id"] = id
    if binary:
        parameters["binary_data_output"] = True
    if parameters:
        document["parameters"] = parameters
    for name, array in inputs.items():
        entry = {"name": name, "shape": list(array.shape), "datatype": _DATATYPES[array.dtype.name]}
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            entry["data"] = array.ravel().tolist()
        document["inputs"].append(entry)
    text = json.dumps(document).encode()
    if not binary:
        return Body(text, {})
    return Body(text + b"".join(array.tobytes() for array in inputs.values()), {HEADER_LENGTH: str(len(text))})


def outputs(answer: httpx.Response) -> tuple[dict, dict[str, np.ndarray]]:
    """The document of a good answer, and its FP32 outputs by name, whichever way they came."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(HEADER_LENGTH, len(answer.content)))
    document, rest = json.loads(answer.content[:length]), answer.content[length:]
    arrays = {}
    for entry in document["outputs"]:
        assert entry["datatype"] == "FP32"
        if "data" in entry:
            assert "parameters" not in entry
            flat = np.array(entry["data"], np.float32)
        else:
            size = entry["parameters"]["binary_data_size"]
            flat, rest = np.frombuffer(rest[:size], "<f4"), rest[size:]
        arrays[entry["name"]] = flat.reshape(entry["shape"])
    assert rest == b""
    return document, arrays


def infer(
    client: httpx.Client, model: str, x: np.ndarray, *, name: str = "x", binary: bool = True, **parameters: object
) -> httpx.Response:
    """One input; `x` is (time, *shape) or (batch, time, *shape)."""
    made = body({name: x if x.ndim == 3 else x[np.newaxis]}, binary=binary, **parameters)
    return client.post(f"/v2/models/{model}/infer", content=made.content, headers=made.headers)
