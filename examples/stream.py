"""A client of the WebSocket stream that resumes its session after a broken connection.

session = Session("ws://127.0.0.1:8000", "co2")
forecasts = session.steps(np.array([[371.2], [371.5]]))
"""

import json
import secrets
import struct
import time

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

_FRAME = struct.Struct("<BBHIIIQ")  # type, flags, reserved, entries; handle, steps, position


class Session:
    """One session of a model with one float32 input and one output per step, bound to handle 0."""

    def __init__(self, url: str, model: str) -> None:
        self.id = secrets.token_urlsafe()
        self.position = 0
        self._address = f"{url}/v1/models/{model}/stream"
        self._socket: ClientConnection | None = None

    def steps(self, values: np.ndarray) -> np.ndarray:
        """Send values (steps, features); returns (steps, outputs). Raises RuntimeError with the server's code."""
        frame = _FRAME.pack(1, 0, 0, 1, 0, len(values), self.position) + values.astype("<f4").tobytes()
        reply = self._exchange(frame, self.position + len(values))
        if isinstance(reply, str):
            raise RuntimeError(reply)
        *_, self.position = _FRAME.unpack_from(reply)
        return np.frombuffer(reply, "<f4", offset=_FRAME.size).reshape(len(values), -1)

    def close(self) -> None:
        """End the session."""
        self._exchange(json.dumps({"op": "close", "handles": [0]}))

    def _exchange(self, message: str | bytes, end: int = 0) -> str | bytes:
        """Send and wait for the reply; resend if the connection breaks. The position prevents a second application."""
        while True:
            try:
                self._socket = self._socket or self._connect()
                self._socket.send(message)
                while not _is_reply(reply := self._socket.recv(), end):
                    pass
                return reply
            except ConnectionClosed as closed:
                if closed.rcvd is not None and closed.rcvd.code == 1009:  # the message is too large
                    raise
                self._socket = None
            except InvalidStatus as refused:
                if refused.response.status_code != 503:
                    raise
                time.sleep(1)  # the server is shutting down; another one will reply

    def _connect(self) -> ClientConnection:
        socket = connect(self._address, max_size=None).__enter__()
        mode = "resume" if self.position else "either"  # the answer to the first attempt may have been lost
        wanted = {"handle": 0, "session_id": self.id, "mode": mode}
        socket.send(json.dumps({"op": "open", "sessions": [wanted]}))
        (opened,) = json.loads(socket.recv())["sessions"]
        if "error" in opened:
            socket.close()
            raise RuntimeError(opened["error"])
        return socket


def _is_reply(message: str | bytes, end: int) -> bool:
    """Is it outputs up to this position, or a refusal? Other messages are ignored, such as `closing`."""
    if isinstance(message, bytes):
        return _FRAME.unpack_from(message)[-1] == end
    return json.loads(message)["op"] in {"error", "closed"}
