"""Replays recorded exchanges with a running server: messages of a stream, and HTTP requests.

Everything is compared except the wording of errors. Floats may differ by a millionth, because their last bits depend on
the machine.
"""

import json
import re
import struct
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
from serving import Running
from waiting import PATIENCE
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

_TOLERANCE = 1e-6
#: Parts of a binary message: (how to compare, number of bytes, or -1 for the rest).
Layout = list[tuple[str, int]]
_WORDS = re.compile(r'"(detail|error)":"(?:[^"\\]|\\.)*"')
_HEADERS = (
    "content-type",
    "unroll-position",
    "unroll-snapshot-length",
    "retry-after",
    "inference-header-content-length",
)


# ── the stream ───────────────────────────────────────────────────────────────────────────────────


class Conversation:
    """One stream connection; it can also stop its server."""

    def __init__(self, running: Running, model: str) -> None:
        self._running = running
        self._address = f"ws://{running.address}/v1/models"
        self._socket: ClientConnection = connect(f"{self._address}/{model}/stream", max_size=None).__enter__()

    def exchange(self, sent: dict[str, Any]) -> list[dict[str, Any]]:
        """Send a recorded message and return the server's messages.

        Args:
            sent: `text` or `hex`, and the expected number of `answers`, counted in texts and entries of frames. Or
                `connect`, a model's name for a connection that must be refused; or `stop`, to stop the server.
        """
        if "connect" in sent:
            return [self._refusal(sent["connect"])]
        if "stop" in sent:
            return self._end()
        self._socket.send(sent["text"] if "text" in sent else bytes.fromhex(sent["hex"]))
        came: list[str | bytes] = []
        while sum(map(_answers, came)) < sent["answers"]:
            came.append(self._socket.recv(PATIENCE))
        return [_recorded(message) for message in came]

    def _refusal(self, model: str) -> dict[str, Any]:
        try:
            connect(f"{self._address}/{model}/stream").__enter__()
        except InvalidStatus as refused:
            return {"status": refused.response.status_code, "text": _without_words(refused.response.body.decode())}
        raise AssertionError("the connection was not refused")

    def _end(self) -> list[dict[str, Any]]:
        ending = threading.Thread(target=self._running.stop)
        ending.start()
        came: list[dict[str, Any]] = []
        try:
            while True:
                came.append(_recorded(self._socket.recv(PATIENCE)))
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            came.append({"closed": closed.rcvd.code})
        self.close()
        ending.join()
        return came

    def close(self) -> None:
        self._socket.close()


def _answers(message: str | bytes) -> int:
    return 1 if isinstance(message, str) else int(struct.unpack_from("<I", message, 4)[0])


def _recorded(message: str | bytes) -> dict[str, Any]:
    return {"text": _without_words(message)} if isinstance(message, str) else {"hex": message.hex()}


def _without_words(text: str) -> str:
    return _WORDS.sub(r'"\1":""', text)


def check_messages(expected: list[dict[str, Any]], found: list[dict[str, Any]], *, any_order: bool) -> None:
    """Compare messages. any_order: Outputs may come in any order, because several frames may answer one."""
    if any_order:
        expected, found = _one_by_one(expected), _one_by_one(found)
    assert [kind for message in found for kind in message] == [kind for message in expected for kind in message]
    for one, other in zip(expected, found, strict=True):
        if "hex" in one:
            content = bytes.fromhex(one["hex"])
            check_bytes(content, bytes.fromhex(other["hex"]), [("same", 8 + 16 * _answers(content)), ("floats", -1)])
        else:
            assert other == one


def _one_by_one(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return texts, then one frame per entry. Assumes a model with one output of two float32 per step."""
    frames = []
    for message in messages:
        if "hex" in message:
            content = bytes.fromhex(message["hex"])
            offset = 8 + 16 * _answers(content)
            for i in range(_answers(content)):
                entry = content[8 + 16 * i : 24 + 16 * i]
                end = offset + 8 * struct.unpack_from("<I", entry, 4)[0]
                frames.append(content[:4] + struct.pack("<I", 1) + entry + content[offset:end])
                offset = end
    return [m for m in messages if "hex" not in m] + [{"hex": frame.hex()} for frame in sorted(frames)]


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────


def ask(client: httpx.Client, sent: dict[str, Any]) -> dict[str, Any]:
    """Send a recorded request (method, path, headers, `text` or `hex`); return status, headers, and `text` or `hex`."""
    content = sent["text"].encode() if "text" in sent else bytes.fromhex(sent.get("hex", ""))
    answer = client.request(sent["method"], sent["path"], headers=sent.get("headers", {}), content=content)
    found: dict[str, Any] = {
        "status": answer.status_code,
        "headers": {name: answer.headers[name] for name in _HEADERS if name in answer.headers},
    }
    if "json" in answer.headers["content-type"]:
        return found | {"text": _without_words(answer.text)}
    return found | {"hex": answer.content.hex()}


def check_answer(expected: dict[str, Any], found: dict[str, Any], sent: dict[str, Any]) -> None:
    """Compare answers. `sent` may name `ignored` members of a JSON answer, or the `layout` of a binary one."""
    assert (found["status"], found["headers"]) == (expected["status"], expected["headers"]), found
    if "text" in expected:
        pairs = [json.loads(answer["text"], object_pairs_hook=list) for answer in (expected, found)]
        _check_json(*pairs, set(sent.get("ignored", ())))
    else:
        text = int(expected["headers"].get("inference-header-content-length", 0))
        contents = bytes.fromhex(expected["hex"]), bytes.fromhex(found["hex"])
        check_bytes(*contents, sent.get("layout", [("same", text), ("floats", -1)]))


def _check_json(expected: Any, found: Any, ignored: set[str]) -> None:
    """Compare JSON with objects as lists of (name, value), so that order counts. Objects may gain members."""
    if isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        if expected and isinstance(expected, list) and isinstance(expected[0], tuple):
            known = {name for name, _ in expected}
            found = [member for member in found if member[0] in known]
        assert len(found) == len(expected), (expected, found)
        if isinstance(expected, tuple) and expected[0] in ignored:
            expected, found = expected[:1], found[:1]
        for one, other in zip(expected, found, strict=True):
            _check_json(one, other, ignored)
    elif isinstance(expected, float):
        assert isinstance(found, float)
        assert abs(found - expected) <= _TOLERANCE
    else:
        assert (type(found), found) == (type(expected), expected)


def check_bytes(expected: bytes, found: bytes, layout: Layout) -> None:
    assert len(found) == len(expected)
    for kind, (one, other) in _parts(expected, found, layout):
        if kind == "same":
            assert other == one
        elif kind == "floats":
            np.testing.assert_allclose(np.frombuffer(other, "<f4"), np.frombuffer(one, "<f4"), rtol=0, atol=_TOLERANCE)
        else:
            assert kind == "skip"


def _parts(expected: bytes, found: bytes, layout: Layout) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    begin = 0
    for kind, size in layout:
        end = len(expected) if size < 0 else begin + size
        yield kind, (expected[begin:end], found[begin:end])
        begin = end
    assert begin == len(expected)
