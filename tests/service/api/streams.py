"""A stream client written from the protocol's description, and a server that offers streams through ASGI only."""

import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import serving
import uvicorn
from serving import Running
from waiting import PATIENCE
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from unroll.bundle import Manifest
from unroll.service.settings import Settings

NO_POSITION = 2**64 - 1


@dataclass(frozen=True)
class Reply:
    """One entry of a frame of outputs: the position reached, and the outputs in the manifest's order."""

    handle: int
    steps: int
    position: int
    outputs: list[np.ndarray]

    @property
    def content(self) -> bytes:
        return b"".join(array.tobytes() for array in self.outputs)


def frame(*entries: tuple) -> bytes:
    """Encode a frame of entries (handle, position or None, input, ...); inputs (T, *shape) in the manifest's order."""
    head = struct.pack("<BBHI", 1, 0, 0, len(entries))
    table = [struct.pack("<IIQ", h, len(x), NO_POSITION if p is None else p) for h, p, x, *_ in entries]
    columns = zip(*(entry[2:] for entry in entries), strict=True)
    return b"".join([head, *table, *[array.tobytes() for column in columns for array in column]])


def replies(manifest: Manifest, message: bytes) -> list[Reply]:
    kind, flags, reserved, number = struct.unpack_from("<BBHI", message)
    assert (kind, flags, reserved) == (2, 0, 0)
    assert number >= 1
    entries = list(struct.iter_unpack("<IIQ", message[8 : 8 + 16 * number]))
    rest = message[8 + 16 * number :]
    found = [Reply(*entry, []) for entry in entries]
    for spec in manifest.outputs:
        for reply in found:
            shape = (reply.steps, *spec.shape) if spec.time else spec.shape
            size = int(np.prod(shape)) * spec.numpy.itemsize
            reply.outputs.append(np.frombuffer(rest[:size], spec.numpy).reshape(shape))
            rest = rest[size:]
    assert rest == b""
    return found


class Client:
    """One connection."""

    def __init__(self, running: Running, manifest: Manifest, model: str | None = None, **options: object) -> None:
        self.manifest = manifest
        path = f"/v1/models/{model or manifest.name}/stream"
        dialled = connect(f"ws://{running.address}{path}", max_size=None, **options)  # type: ignore[arg-type]
        self.socket: ClientConnection = dialled.__enter__()

    def control(self, op: str, **members: object) -> dict:
        self.socket.send(json.dumps({"op": op, **members}))
        message = self.socket.recv(PATIENCE)
        assert isinstance(message, str)
        return json.loads(message)

    def open(self, *wanted: dict) -> list[dict]:
        answer = self.control("open", sessions=list(wanted))
        assert answer["op"] == "opened", answer
        assert [item["handle"] for item in answer["sessions"]] == [item["handle"] for item in wanted]
        return answer["sessions"]

    def bind(self, *handles: int, **options: object) -> list[str]:
        """Open a new session for each handle; return the ids."""
        opened = self.open(*[{"handle": handle, **options} for handle in handles])
        assert not [item for item in opened if "error" in item], opened
        return [item["session_id"] for item in opened]

    def receive(self, number: int) -> tuple[list[Reply], list[dict]]:
        """Receive this number of answers; return outputs and errors."""
        good: list[Reply] = []
        bad: list[dict] = []
        while len(good) + len(bad) < number:
            message = self.socket.recv(PATIENCE)
            if isinstance(message, str):
                bad.append(json.loads(message))
                assert bad[-1]["op"] == "error"
                assert bad[-1]["detail"]
            else:
                good += replies(self.manifest, message)
        assert len(good) + len(bad) == number
        return good, bad

    def step(self, *entries: tuple) -> dict[int, Reply]:
        """Send a frame and return one reply per handle; all must succeed."""
        self.socket.send(frame(*entries))
        good, bad = self.receive(len(entries))
        assert not bad
        assert sorted(reply.handle for reply in good) == sorted(entry[0] for entry in entries)
        return {reply.handle: reply for reply in good}

    def refused(self, *entry: object) -> tuple[str, dict]:
        """Send one entry as a frame; return the error's code and the whole error."""
        self.socket.send(frame(entry))
        good, (error,) = self.receive(1)
        assert not good
        assert (error["handle"], error["position"]) == entry[:2]
        return error["code"], error

    def abort(self) -> None:
        """Cut the connection as a crash would: no close frame, and unread answers are lost."""
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.socket.shutdown(socket.SHUT_RD)  # wakes the reader thread, which then closes


Dial = Callable[..., Client]


class Plain(Running):
    """A server with uvicorn's own WebSocket protocol, as on any ASGI server."""

    def __init__(self, settings: Settings) -> None:
        def config(application: object, *_: object) -> uvicorn.Config:
            options = {"access_log": False, "log_config": None, "ws_per_message_deflate": False}
            return uvicorn.Config(application, host="127.0.0.1", port=0, **options)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "uvicorn_config", config)
            super().__init__(settings)


def last_messages(client: Client) -> list[str | bytes]:
    """Receive the remaining messages until the server closes."""
    messages: list[str | bytes] = []
    try:
        while True:
            messages.append(client.socket.recv(PATIENCE))
    except ConnectionClosed as closed:
        assert closed.rcvd
        assert closed.rcvd.code == 1012
        assert closed.rcvd.reason
    return messages
