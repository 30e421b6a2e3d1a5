"""WebSocket for the load generator: handshake, frames built and masked in advance, and the end of a reply.

Binary messages are those of /v1/models/{model}/stream: a header (type u8, flags u8, reserved u16, entries u32), for
each entry (handle u32, steps u32, position u64), then the entries' values, all little-endian. A request is answered
once as many entries have come back as it has, in however many messages.
"""

import base64
import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.load import Client, Connection
from bench.servers import HOST

STEPS, OUTPUTS = 1, 2
#: No position: the chunk begins at the session's current position.
NO_POSITION = 2**64 - 1
HEADER = struct.Struct("<BBHI")
ENTRY = np.dtype([("handle", "<u4"), ("steps", "<u4"), ("position", "<u8")])

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x1, 0x2, 0x8, 0x9, 0xA
_FINAL, _MASKED = 0x80, 0x80


def websocket_client(
    path: str, requests: Sequence[bytes], sessions: Sequence[int], prefix: str | None, entries: int
) -> Client:
    """A client that opens or resumes its sessions when it connects, with ids of this prefix; None to open none."""
    opening = None if prefix is None else opening_message(prefix, sessions)
    connect = partial(WebSocketConnection, path, opening, entries)
    return Client(connect, requests, sessions, weight=entries)


def handshake(path: str, key: bytes) -> bytes:
    head = (
        f"GET {path} HTTP/1.1\r\nhost: {HOST}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        f"sec-websocket-version: 13\r\nsec-websocket-key: {key.decode()}\r\n\r\n"
    )
    return head.encode()


def opening_message(prefix: str, sessions: Sequence[int]) -> bytes:
    """The message that opens or resumes the sessions; a session's handle is its number."""
    sessions_to_open = [{"handle": number, "session_id": f"{prefix}-{number}", "mode": "either"} for number in sessions]
    return frame(json.dumps({"op": "open", "sessions": sessions_to_open}).encode(), _TEXT)


def steps_frame(handles: Sequence[int] | np.ndarray, values: np.ndarray) -> bytes:
    """A frame with one step of each handle. values: (handles, features) float32."""
    return frame(steps_message(handles, values))


def steps_message(handles: Sequence[int] | np.ndarray, values: np.ndarray) -> bytes:
    """The payload of that frame."""
    entries = np.zeros(len(handles), ENTRY)
    entries["handle"], entries["steps"], entries["position"] = handles, 1, NO_POSITION
    return HEADER.pack(STEPS, 0, 0, len(handles)) + entries.tobytes() + values.tobytes()


def read_outputs(message: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns handles (N,), positions (N,), and values of one step of each (N, features)."""
    kind, _, _, count = HEADER.unpack_from(message)
    entries = np.frombuffer(message, ENTRY, count, HEADER.size)
    if kind != OUTPUTS or (entries["steps"] != 1).any():
        raise ValueError(f"not a frame of outputs of one step each: {message[:24]!r}")
    values = np.frombuffer(message, np.float32, offset=HEADER.size + entries.nbytes).reshape(count, -1)
    return entries["handle"], entries["position"], values


def frame(payload: bytes, kind: int = _BINARY) -> bytes:
    """A whole masked message."""
    key = os.urandom(4)
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", _FINAL | kind, _MASKED | size)
    elif size < 2**16:
        head = struct.pack("!BBH", _FINAL | kind, _MASKED | 126, size)
    else:
        head = struct.pack("!BBQ", _FINAL | kind, _MASKED | 127, size)
    mask = np.resize(np.frombuffer(key, np.uint8), size)
    return head + key + (np.frombuffer(payload, np.uint8) ^ mask).tobytes()


class WebSocketConnection(Connection):
    """A WebSocket connection; the answer to the message `opening`, if any, must arrive before the first request."""

    def __init__(self, path: str, opening: bytes | None, entries: int, client: Client) -> None:
        super().__init__(client)
        self._path = path
        self._opening = opening
        self._entries = entries
        self._received = bytearray()
        self._on_data: Callable[[], None] = self._read_handshake
        self._answered = 0
        self._messages: list[bytes] = []
        self._key = base64.b64encode(os.urandom(16))

    def begin(self) -> None:
        self.transport.write(handshake(self._path, self._key))

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._on_data()

    def _read_handshake(self) -> None:
        head, end, rest = bytes(self._received).partition(b"\r\n\r\n")
        if not end:
            return
        accept = base64.b64encode(hashlib.sha1(self._key + _GUID).digest())
        if not head.startswith(b"HTTP/1.1 101") or accept not in head or b"permessage-deflate" in head:
            self.fail(f"no plain WebSocket: {head + rest!r}")
            return
        self._received = bytearray(rest)
        self._on_data = self._read_frames
        if self._opening is None:
            self.ready.set_result(None)
        else:
            self.transport.write(self._opening)
        self._read_frames()

    def _read_frames(self) -> None:
        received = self._received
        while len(received) >= 2:
            first, size, begin = received[0], received[1], 2
            if size == 126:
                if len(received) < 4:
                    return
                size, begin = int.from_bytes(received[2:4]), 4
            elif size == 127:
                if len(received) < 10:
                    return
                size, begin = int.from_bytes(received[2:10]), 10
            if len(received) < begin + size:
                return
            payload = bytes(received[begin : begin + size])
            del received[: begin + size]
            if first == _FINAL | _BINARY:
                self._on_outputs(payload)
            else:
                self._on_other_frame(first, payload)

    def _on_outputs(self, payload: bytes) -> None:
        self._messages.append(payload)
        self._answered += int.from_bytes(payload[4:8], "little")
        if self._answered >= self._entries:
            messages, self._messages = self._messages, []
            self._answered = 0
            self.replied(messages)

    def _on_other_frame(self, first: int, payload: bytes) -> None:
        if first == _FINAL | _PING:
            self.transport.write(frame(payload, _PONG))
        elif first == _FINAL | _TEXT and not self.ready.done():
            error = _opening_error(json.loads(payload))
            if error:
                self.fail(f"sessions were not opened: {error}")
            else:
                self.ready.set_result(None)
        elif first != _FINAL | _PONG:
            self.fail(f"a frame that begins with {first:#x}: {payload[:400]!r}")


def _opening_error(opened: dict[str, Any]) -> object:
    """The error in the answer to an opening message; empty if there is none."""
    if opened.get("op") != "opened":
        return opened
    return [entry for entry in opened["sessions"] if "error" in entry][:1]
