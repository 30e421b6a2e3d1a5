"""WebSocket frames however TCP splits them: header and payload apart, or several frames at once."""

import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from client_frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, masked
from raw_http import UPGRADE, Wire
from serving import Oracle, Running
from streams import Reply, frame, replies

OPEN = masked(TEXT, json.dumps({"op": "open", "sessions": [{"handle": 0, "depth": 16}]}).encode())


class RawStream:
    """One session on one stream; the client controls how many bytes the server reads at once."""

    def __init__(self, running: Running, oracle: Oracle, *opening: bytes) -> None:
        """opening: `UPGRADE` and `OPEN` in segments, and possibly frames."""
        self._manifest = oracle.manifest
        self._wire = Wire(running.port)
        self._other = Wire(running.port)
        self.send(*opening or [UPGRADE + OPEN])
        assert self._wire.head()[0] == 101
        assert self.message()[0] == TEXT

    def send(self, first: bytes, *segments: bytes) -> None:
        """Send each part once the server has read the one before, which its answer on another connection shows."""
        self._wire.send(first)
        for segment in segments:
            self._other.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self._other.answer()
            self._wire.send(segment)

    def message(self) -> tuple[int, bytes]:
        """Return the first byte and the payload of the server's next message."""
        return self._wire.frame()

    def reply(self) -> Reply:
        first, payload = self.message()
        assert first == BINARY, payload
        (reply,) = replies(self._manifest, payload)
        return reply

    def ending(self) -> tuple[int, str]:
        """Read to the end of the connection; return the server's close code and reason."""
        while True:
            first, payload = self.message()
            if first == CLOSE:
                return int.from_bytes(payload[:2]), payload[2:].decode()

    def close(self) -> None:
        self._wire.socket.close()
        self._other.socket.close()


@pytest.fixture
def stream(server: Running, oracle: Any) -> Iterator[RawStream]:
    stream = RawStream(server, oracle("lstm"))
    yield stream
    stream.close()


def test_frames_with_any_first_byte_of_the_masked_payload(stream: RawStream, x: np.ndarray) -> None:
    """A payload that looks like a frame header is not taken for one."""
    step = frame((0, None, x[:1]))
    for first in range(256):
        sent = masked(BINARY, step, bytes([step[0] ^ first, step[1] ^ 0x85, 0, 0]))
        stream.send(sent[:6], sent[6:])
        assert stream.reply().position == first + 1


@pytest.mark.parametrize("steps", [1, 12, 6000])
def test_a_frame_cut_at_every_byte_of_its_header_and_beyond(stream: RawStream, x: np.ndarray, steps: int) -> None:
    """Covers lengths of 7, 16 and 64 bits."""
    chunk = np.resize(x, (steps, 3))
    sent = masked(BINARY, frame((0, None, chunk)), bytes([0x83, 0xFF, 0x21, 0x3D]))  # payload: 82 ff 21 3d …
    cuts = range(1, min(len(sent), 60))
    for number, cut in enumerate(cuts, 1):
        stream.send(sent[:cut], sent[cut:])
        assert stream.reply().position == number * steps


def test_a_conversation_cut_at_every_byte(stream: RawStream, x: np.ndarray) -> None:
    """Fragments with a ping in between, two frames, a text message and a pong, sent whole and split at every byte."""
    step = frame((0, None, x[:1]))
    sent = b"".join(
        [
            masked(BINARY & 0x7F, step[:5]),
            masked(PING, b"\x82\x85"),
            masked(CONTINUATION & 0x7F, step[5:9]),
            masked(CONTINUATION, step[9:]),
            masked(BINARY, step) * 2,
            masked(TEXT, b'{"op": "detach", "handles": [7]}'),
            masked(PONG, b"\x82"),
            masked(BINARY, step),
        ]
    )
    before = 0
    for cut in range(len(sent)):
        stream.send(*filter(None, (sent[:cut], sent[cut:])))
        got: list[tuple[int, bytes]] = []
        while before < 4 * (cut + 1):
            got.append(stream.message())
            if got[-1][0] == BINARY:
                before += len(replies(stream._manifest, got[-1][1]))
        assert [payload for first, payload in got if first == PONG] == [b"\x82\x85"]
        (error,) = [json.loads(payload) for first, payload in got if first == TEXT]
        assert error["handle"] == 7


def test_frames_that_arrive_with_the_handshake_are_handled(server: Running, oracle: Any, x: np.ndarray) -> None:
    """The handshake and the first frames in two segments, cut from the end of the handshake on."""
    ping, steps = masked(PING, b"early"), [masked(BINARY, frame((0, i, x[i : i + 1]))) for i in range(2)]
    sent = UPGRADE + OPEN + steps[0] + ping + steps[1]
    for cut in (1, *range(len(UPGRADE) - 4, len(sent), 4), len(sent)):
        stream = RawStream(server, oracle("lstm"), *filter(None, (sent[:cut], sent[cut:])))
        got = sorted(stream.message() for _ in range(3))
        assert got[-1] == (PONG, b"early")
        ends = [reply.position for _, payload in got[:-1] for reply in replies(oracle("lstm").manifest, payload)]
        assert ends == [1, 2]
        stream.close()


def test_outputs_do_not_depend_on_the_cuts(stream: RawStream, oracle: Any, x: np.ndarray) -> None:
    sent = b"".join(masked(BINARY, frame((0, None, x[i : i + 1])), bytes([0x83, i, 2, 3])) for i in range(len(x)))
    stream.send(*(sent[begin:end] for begin, end in pairwise([*range(0, len(sent), 7), len(sent)])))
    got: list[np.ndarray] = []
    while len(got) < len(x):
        first, payload = stream.message()
        assert first == BINARY, payload
        got += [reply.outputs[0] for reply in replies(stream._manifest, payload)]
    assert np.concatenate(got).tobytes() == oracle("lstm")(x).tobytes()


def test_text_that_is_not_utf_8_ends_the_connection(stream: RawStream) -> None:
    stream.send(masked(TEXT, b'{"op": "detach", "handles": [7], "x": "\xff"}'))
    first, payload = stream.message()
    assert (first, payload[:2]) == (0x88, struct.pack("!H", 1007))
