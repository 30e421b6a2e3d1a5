"""Drives examples/stream.py: one session per stream, for a model with one input and one output."""

import asyncio
import json
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed

from unroll.client.conformance.python_driver import Command, PythonDriver, drive
from unroll.examples.stream import Session


class ExampleDriver(PythonDriver):
    def __init__(self) -> None:
        super().__init__(lambda url, **_: url.replace("http", "ws"))

    async def do(self, command: Command) -> dict[str, Any]:
        if command["do"] not in {"start", "open", "step", "steps", "close"} or command.get("over") == "rest":
            return {"unsupported": command["do"]}
        if missing := command.keys() & {"id", "static", "durability"} or command.get("model", "toy") == "tensors":
            return {"unsupported": f"an open with {missing}"}
        try:
            return await super().do(command)
        except RuntimeError as error:
            (text,) = error.args
            return {"error": {"code": (json.loads(text) if isinstance(text, str) else text)["code"]}}
        except (OSError, ConnectionClosed):
            return {"error": {"code": "connection_failed"}}

    async def _start(self, command: Command) -> dict[str, Any]:
        for session in self._sessions.values():
            if session._socket is not None:
                session._socket.close()
        self._sessions, self._client = {}, command["url"].replace("http", "ws")
        return {}

    async def _open(self, command: Command) -> dict[str, Any]:
        session = self._sessions[command["session"]] = Session(self._client, command["model"])
        while session._socket is None:
            try:
                session._socket = session._connect()
            except ConnectionClosed:
                continue  # as its _exchange does
        return {"id": session.id, "position": session.position}

    async def _apply(self, command: Command, method: str) -> dict[str, Any]:
        session, single = self._sessions[command["session"]], method == "step"
        values = np.array([command["values"]] if single else command["values"], np.float32)
        outputs = session.steps(values)
        return {"outputs": (outputs[0] if single else outputs).tolist(), "position": session.position}


if __name__ == "__main__":
    asyncio.run(drive(ExampleDriver()))
