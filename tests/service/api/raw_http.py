"""HTTP by hand: requests as bytes, for input that no client library sends."""

import socket

import numpy as np
from waiting import PATIENCE

STEP = np.float32([[0.1, -0.2, 0.3]])
#: Opens a stream.
UPGRADE = (
    b"GET /v1/models/lstm/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

Answer = tuple[int, dict[str, str], bytes]


class Wire:
    """A connection that sends requests as raw bytes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send each part immediately
        self._received = b""

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.socket.sendall(part)

    def end(self) -> None:
        """Shut down the sending side; reading still works."""
        self.socket.shutdown(socket.SHUT_WR)

    def head(self) -> tuple[int, dict[str, str]]:
        """Read the status and the headers of the next answer; header names are in lower case."""
        while b"\r\n\r\n" not in self._received:
            self._received += self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines)

    def answer(self, *, to_head: bool = False) -> Answer:
        """Read the status, headers and body of the next answer. `to_head`: expect no body."""
        status, headers = self.head()
        bare = to_head or status == 204 or status < 200
        return status, headers, self.exactly(0 if bare else int(headers["content-length"]))

    def exactly(self, size: int) -> bytes:
        """Read exactly this many bytes."""
        while len(self._received) < size:
            self._received += self._more()
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    def frame(self) -> tuple[int, bytes]:
        """Read the first byte and the payload of the next WebSocket frame."""
        first, size = self.exactly(2)
        if size > 125:
            size = int.from_bytes(self.exactly(2 if size == 126 else 8))
        return first, self.exactly(size)

    def closed(self) -> bool:
        """Return whether the server closed the connection without sending more."""
        return self._received == self.socket.recv(1) == b""

    def _more(self) -> bytes:
        data = self.socket.recv(65536)
        assert data, f"closed after {self._received!r}"
        return data


def request(path: str, body: bytes = STEP.tobytes(), *headers: str, version: str = "1.1", steps: int = 1) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/octet-stream"]
    lines += [f"Unroll-Steps: {steps}", *headers]
    if not any(header.lower().startswith("transfer-encoding") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "\r\n"]).encode() + body
