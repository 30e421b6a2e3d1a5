"""Sends chunks to any replica over four protocols.

The outcome is a `Reply`, or `Broken` if no complete reply came because the connection was refused, cut or silent. After
`Broken` it is unknown whether the chunk was applied.
"""

import asyncio
import json
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

#: Code of a refusal by a proxy that has no server.
NO_SERVER = "no_server"

HTTP_WAYS = ("raw", "json", "v2")
WAYS = (*HTTP_WAYS, "stream")

_RAW = {"content-type": "application/octet-stream"}
_JSON = {"content-type": "application/json"}
_HEADER = struct.Struct("<BBHI")  # type, flags, reserved, entries
_ENTRY = struct.Struct("<IIQ")  # handle, steps, position
_UNSAID = 2**64 - 1


class Broken(Exception):
    """No complete reply came. kind: Name of the exception that showed it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.kind = type(error).__name__


@dataclass(frozen=True)
class Reply:
    """A server's reply. outputs: Unparsed bytes, for exact comparison. code, expected: Set for errors only."""

    status: int
    outputs: bytes = b""
    position: int = -1
    code: str = ""
    expected: int | None = None
    retry_after: float | None = None
    document: Mapping = field(default_factory=dict)


@dataclass
class Wires:
    """HTTP connections to a model with one float32 input and output per step. timeout: Seconds per reply."""

    model: str
    features: tuple[str, str]  # names of the input and the output
    timeout: float = 5.0
    _idle: dict[int, dict[str, list["_Connection"]]] = field(default_factory=lambda: defaultdict(dict))

    async def send(
        self, way: str, port: int, session: str, x: np.ndarray, position: int | None, **flags: bool
    ) -> Reply:
        """Send one chunk, x (time, features), by one of HTTP_WAYS. flags: sequence_start or sequence_end, in v2 only.

        Raises Broken.
        """
        path, body, headers = f"/v1/models/{self.model}/sessions/{session}/steps", b"", _JSON
        if way == "raw":
            body, headers = x.tobytes(), _RAW | {"unroll-steps": str(len(x))}
            headers |= {} if position is None else {"unroll-position": str(position)}
        elif way == "json":
            body = json.dumps({"inputs": x.tolist(), "position": position}).encode()
        else:
            path, body = f"/v2/models/{self.model}/infer", self._infer(session, x, position, flags)
        status, found, content = await self.ask(port, "POST", path, body, headers)
        if status != 200:
            return refusal(status, _document(status, content), found.get("retry-after"))
        if way == "raw":
            return Reply(status, content, int(found["unroll-position"]))
        document = json.loads(content)
        if way == "json":
            return Reply(status, _packed(document["outputs"]), document["position"])
        (output,) = document["outputs"]
        return Reply(status, _packed(output["data"]), document["parameters"]["sequence_position"])

    def _infer(self, session: str, x: np.ndarray, position: int | None, flags: dict[str, bool]) -> bytes:
        tensor = {"name": self.features[0], "shape": [1, *x.shape], "datatype": "FP32", "data": x.ravel().tolist()}
        parameters = {"sequence_id": session, **flags}
        if position is not None:
            parameters["sequence_position"] = position
        outputs = [{"name": self.features[1]}]
        return json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()

    async def call(self, method: str, port: int, path: str, body: object = None) -> Reply:
        """Call another route of the model. A body of bytes is a snapshot; a snapshot returned is in `outputs`."""
        sent = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        media = _RAW if isinstance(body, bytes) else _JSON if sent else {}
        status, headers, content = await self.ask(port, method, f"/v1/models/{self.model}{path}", sent, media)
        if headers["content-type"] == _RAW["content-type"]:
            return Reply(status, content, int(headers["unroll-position"]))
        document = _document(status, content)
        if status < 300:
            return Reply(status, position=document["position"], document=document)
        return refusal(status, document, headers.get("retry-after"))

    async def ask(
        self, port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body of the answer. Raises Broken.

        All requests on a connection have the same head, so the server may reuse the one it parsed before.
        """
        headers = headers or {}
        kind = f"{path} {headers.get('unroll-steps', headers)}"
        try:
            async with asyncio.timeout(self.timeout):
                idle = self._idle[port].get(kind)
                connection = idle.pop() if idle else await _Connection.open(port)
                try:
                    answer = await connection.ask(method, path, body, headers)
                except BaseException:
                    connection.close()
                    raise
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            self._forget(port)
            raise Broken(error) from error
        if answer[1].get("connection") == "close":
            connection.close()
        else:
            self._idle[port].setdefault(kind, []).append(connection)
        return answer

    def close(self) -> None:
        for port in [*self._idle]:
            self._forget(port)

    def _forget(self, port: int) -> None:
        """Drop all connections to the port: if one broke, the rest probably did too."""
        for connections in self._idle.pop(port, {}).values():
            for connection in connections:
                connection.close()


class _Connection:
    """One persistent HTTP connection with one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "_Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{fields}\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        content = await self._reader.readexactly(int(found["content-length"]))
        return int(lines[0].split()[1]), found, content

    def close(self) -> None:
        self._writer.transport.abort()


class Stream:
    """A WebSocket to one replica, with one session as handle 0. It is unusable once a call has raised Broken.

    depth: Maximum chunks in flight.
    """

    def __init__(self, wires: Wires, port: int, session: str, depth: int = 1) -> None:
        self._wires, self._port, self._session, self._depth = wires, port, session, depth
        self._socket: ClientConnection | None = None

    async def send(self, x: np.ndarray, position: int | None) -> Reply:
        """Send one chunk, x (time, features)."""
        return (await self.send_all([x], position))[0]

    async def send_all(self, chunks: Sequence[np.ndarray], position: int | None) -> list[Reply]:
        """Send consecutive chunks without waiting; return their replies, or only the refusal to bind the session."""
        replies: list[Reply] = []
        try:
            async with asyncio.timeout(self._wires.timeout):
                if self._socket is None and (refused := await self._open()) is not None:
                    return [refused]
                assert self._socket is not None
                for x in chunks:
                    place = _UNSAID if position is None else position
                    await self._socket.send(_HEADER.pack(1, 0, 0, 1) + _ENTRY.pack(0, len(x), place) + x.tobytes())
                    position = None if position is None else position + len(x)
                while len(replies) < len(chunks):
                    replies += _stream_replies(await self._receive())
        except (OSError, WebSocketException) as error:
            raise Broken(error) from error
        return replies

    async def _open(self) -> Reply | None:
        """Connect and bind the session; return the refusal, if any."""
        address = f"ws://127.0.0.1:{self._port}/v1/models/{self._wires.model}/stream"
        self._socket = await connect(address, compression=None, open_timeout=None, ping_interval=None, proxy=None)
        wanted = {"handle": 0, "session_id": self._session, "mode": "resume", "depth": self._depth}
        await self._socket.send(json.dumps({"op": "open", "sessions": [wanted]}))
        (opened,) = json.loads(await self._receive())["sessions"]
        return refusal(0, opened["error"]) if "error" in opened else None

    async def _receive(self) -> str | bytes:
        """Return the next reply. Skip `closing`, which announces that the server will close the connection."""
        assert self._socket is not None
        while True:
            message = await self._socket.recv()
            if isinstance(message, bytes) or json.loads(message)["op"] != "closing":
                return message

    def close(self) -> None:
        if self._socket is not None:
            self._socket.transport.abort()


def refusal(status: int, document: Mapping, retry_after: str | float | None = None) -> Reply:
    """Parse an error of v1, v2 or a stream. A stream's error has no status but contains `retry_after`."""
    wait = document.get("retry_after", retry_after)
    return Reply(
        status,
        code=document["code"],
        expected=document.get("expected"),
        retry_after=None if wait is None else float(wait),
        document=document,
    )


def _stream_replies(message: str | bytes) -> list[Reply]:
    if isinstance(message, str):
        return [refusal(0, json.loads(message))]
    kind, _, _, count = _HEADER.unpack_from(message)
    assert kind == 2, message
    begin = _HEADER.size + count * _ENTRY.size
    entries = list(_ENTRY.iter_unpack(message[_HEADER.size : begin]))
    size = (len(message) - begin) // sum(steps for _, steps, _ in entries)  # bytes of one step's outputs
    replies = []
    for _, steps, position in entries:
        end = begin + steps * size
        replies.append(Reply(200, message[begin:end], position))
        begin = end
    return replies


def _document(status: int, content: bytes) -> Mapping:
    """Parse a JSON body. A proxy without a server replies with an HTML page instead."""
    try:
        document: Mapping = json.loads(content)
    except ValueError:
        return {"code": NO_SERVER if status in (502, 503, 504) else f"not JSON: {content[:100]!r}"}
    return document


def _packed(values: list) -> bytes:
    """Return JSON numbers as the bytes of their float32 values."""
    return np.array(values, np.float32).tobytes()
