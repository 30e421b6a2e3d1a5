"""A connection without a network."""

import asyncio
import json
from dataclasses import dataclass, field

import numpy as np
from serving import HeldEngine
from streams import Reply, frame, replies
from waiting import reached

from unroll.bundle import Manifest
from unroll.service.api.app_state import AppState
from unroll.service.api.stream.connection import Connection


@dataclass
class FakeLink:
    """Records messages (text as parsed JSON), and pauses and resumptions of reading."""

    sent: list[bytes | dict] = field(default_factory=list)
    flow: list[str] = field(default_factory=list)
    closed: asyncio.Future[None] = field(default_factory=asyncio.Future)

    def attach(self, *_: object) -> None: ...

    def send_binary(self, message: bytes) -> None:
        self.sent.append(message)

    def send_text(self, message: bytes) -> None:
        self.sent.append(json.loads(message))

    def pause(self) -> None:
        self.flow.append("pause")

    def resume(self) -> None:
        self.flow.append("resume")

    def unsent(self) -> int:
        return 0

    def close(self, code: int, reason: str) -> None:
        self.sent.append({"op": "hung up", "code": code})

    def abort(self) -> None: ...


@dataclass
class Wire:
    """A connection of a server that does not listen."""

    connection: Connection
    server: AppState
    manifest: Manifest
    sent: list[bytes | dict]
    flow: list[str]
    engine: HeldEngine

    def frame(self, handles: range, steps: int = 1) -> None:
        self.connection.on_binary(frame(*[(handle, None, np.ones((steps, 3), "<f4")) for handle in handles]))

    async def bind(self, number: int, **options: object) -> None:
        wanted = [{"handle": handle, **options} for handle in range(number)]
        self.connection.on_text(json.dumps({"op": "open", "sessions": wanted}).encode())
        await reached(lambda: self.sent)
        self.flow.clear()
        opened = self.sent.pop()
        assert isinstance(opened, dict)
        assert not [item for item in opened["sessions"] if "error" in item]

    def answered(self) -> list[Reply]:
        return [r for message in self.sent if isinstance(message, bytes) for r in replies(self.manifest, message)]
