"""HTTP/1.1 for the load generator: builds requests and finds the end of a reply."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from bench.load import Client, Connection
from bench.servers import HOST

RAW, JSON = "application/octet-stream", "application/json"
INFER_HEADER = "inference-header-content-length"
_LENGTH = b"\r\ncontent-length:"


def post(path: str, body: bytes | Mapping[str, object], headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request. A mapping is sent as JSON, bytes as they are, with the media type of each."""
    media, content = (RAW, body) if isinstance(body, bytes) else (JSON, json.dumps(body).encode())
    fields = {"host": HOST, "content-type": media, "content-length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def infer(model: str, x: np.ndarray, **parameters: int) -> bytes:
    """A request of the Open Inference Protocol. x: (time, features)."""
    length, body = infer_body(x, **parameters)
    return post(f"/v2/models/{model}/infer", body, {"content-type": "", INFER_HEADER: str(length)})


def infer_body(x: np.ndarray, **parameters: int) -> tuple[int, bytes]:
    """Its body as tritonclient.http writes it, with binary tensors behind the JSON, and the length of the JSON."""
    size = {"binary_data_size": x.nbytes}
    document: dict[str, object] = {
        "inputs": [{"name": "x", "shape": [1, *x.shape], "datatype": "FP32", "parameters": size}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    if parameters:
        document["parameters"] = parameters
    text = json.dumps(document, separators=(",", ":")).encode()
    return len(text), text + x.tobytes()


def http_client(
    requests: Sequence[bytes], session: int | None = None, opening: Sequence[bytes] = (), unstepped: int = 0
) -> Client:
    return Client(HttpConnection, requests, () if session is None else (session,), opening, unstepped)


class HttpConnection(Connection):
    def begin(self) -> None:
        self._received = b""
        self._head_size = self._reply_size = -1  # of the last reply, in bytes
        self.ready.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        if len(data) != self._reply_size or data[self._head_size - 4 : self._head_size] != b"\r\n\r\n":
            # Otherwise the reply and its head have the sizes of the last ones.
            head = data.find(b"\r\n\r\n")
            length = _content_length(data[: head + 2]) if head >= 0 else 0
            if head < 0 or len(data) < head + 4 + length:
                self._received = data
                return
            if length < 0 or len(data) > head + 4 + length:
                self.fail(f"not one whole reply: {data[:200]!r}")
                return
            self._head_size, self._reply_size = head + 4, len(data)
        self._received = b""
        self.replied([data[self._head_size :]], "" if data[9:11] == b"20" else repr(data[:400]))


def _content_length(head: bytes) -> int:
    """The content length, or -1 unless the header is there exactly once, as digits."""
    head = head.lower()
    _, _, after = head.partition(_LENGTH)
    digits = after[: after.find(b"\r\n")].strip()
    return int(digits) if digits.isdigit() and _LENGTH not in after else -1
