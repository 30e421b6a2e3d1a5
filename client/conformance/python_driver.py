"""Drives `unroll.Client`, or `unroll.AsyncClient` with --asynchronous. A short example of a driver."""

import asyncio
import base64
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import unroll
from unroll.client import errors
from unroll.client.async_stream import as_async

Command = dict[str, Any]


class PythonDriver:
    """One client, with its sessions by name."""

    def __init__(self, make_client: Callable[..., Any]) -> None:
        self._make_client = make_client
        self._client: Any = None
        self._sessions: dict[str, Any] = {}
        self._streams: dict[str, Any] = {}

    async def do(self, command: Command) -> dict[str, Any]:
        """Run a command, and return its outcome."""
        operation = getattr(self, f"_{command['do']}", None)
        if operation is None:
            return {"unsupported": f"no operation {command['do']}"}
        try:
            return {"ok": await operation(command)}
        except errors.UnrollError as error:
            return {"error": {"code": _code(error), "detail": str(error)}}

    async def _start(self, command: Command) -> dict[str, Any]:
        for stream in self._streams.values():
            await _result(stream.disconnect())
        if self._client is not None:
            await _result(self._client.close())
        self._client = self._make_client(command["url"], timeout=command["timeout"], retry_for=command["retry_for"])
        self._sessions, self._streams = {}, {}
        return {}

    async def _open(self, command: Command) -> dict[str, Any]:
        options: Command = {name: command[name] for name in ("mode", "durability", "static") if name in command}
        if command["over"] == "stream":
            stream = await self._stream(command["model"])
            (session,) = await _result(stream.open([command["id"]] if "id" in command else 1, **options))
        else:
            if "snapshot" in command:
                options["snapshot"] = base64.b64decode(command["snapshot"])
            session = await _result(self._client.session(command["model"], command.get("id"), **options))
        self._sessions[command["session"]] = session
        return {"id": session.id, "position": session.position}

    async def _stream(self, model: str) -> Any:
        if model not in self._streams:
            stream = await _result(self._client.stream(model))
            if hasattr(stream, "__aenter__"):
                await stream.__aenter__()
            self._streams[model] = stream
        return self._streams[model]

    async def _step(self, command: Command) -> dict[str, Any]:
        return await self._apply(command, "step")

    async def _steps(self, command: Command) -> dict[str, Any]:
        return await self._apply(command, "steps")

    async def _apply(self, command: Command, method: str) -> dict[str, Any]:
        session = self._sessions[command["session"]]
        position = {"position": command["at"]} if "at" in command else {}
        outputs = await _result(getattr(session, method)(_numbers(command["values"]), **position))
        return {"outputs": _lists(outputs), "position": session.position}

    async def _together(self, command: Command) -> dict[str, Any]:
        sessions, refused = [self._sessions[name] for name in command["sessions"]], {}
        stream = self._streams["toy"]
        try:
            outputs = await _result(stream.step(sessions, np.array(command["values"], np.float32)))
        except errors.SomeFailed as some:
            outputs, refused = some.outputs, {str(index): error.code for index, error in some.errors.items()}
        return {"outputs": outputs.tolist(), "positions": [each.position for each in sessions], "errors": refused}

    async def _rollout(self, command: Command) -> dict[str, Any]:
        session, steps, between = self._sessions[command["session"]], [], []
        options = {name: _numbers(command[name]) for name in ("inputs", "outputs") if name in command}
        on = "session" if command.get("applies") else "fork"
        rolling = session.rollout(command["steps"], map=command["map"], on=on, **options)
        async for step in as_async(rolling):
            inputs, outputs = _lists(step.inputs), _lists(step.outputs)
            steps.append({"position": step.position, "inputs": inputs, "outputs": outputs})
            if len(steps) == 1:
                between = [await self.do(each) for each in command.get("between", ())]
            if len(steps) == command.get("take"):
                break
        await _result(rolling.aclose() if hasattr(rolling, "aclose") else rolling.close())
        return {"steps": steps, "position": session.position, "between": between}

    async def _sequence(self, command: Command) -> dict[str, Any]:
        static = [command["static"]] if "static" in command else None
        sequences = self._client.sequences(command["model"], [_numbers(command["values"])], static=static)
        return {"outputs": _lists((await _result(sequences))[0])}

    async def _models(self, command: Command) -> dict[str, Any]:
        return {"models": [model.name for model in await _result(self._client.models())]}

    async def _refresh(self, command: Command) -> dict[str, Any]:
        return {"position": await _result(self._sessions[command["session"]].refresh())}

    async def _fork(self, command: Command) -> dict[str, Any]:
        fork = await _result(self._sessions[command["session"]].fork())
        self._sessions[command["as"]] = fork
        return {"id": fork.id, "position": fork.position}

    async def _snapshot(self, command: Command) -> dict[str, Any]:
        return {"snapshot": base64.b64encode(await _result(self._sessions[command["session"]].snapshot())).decode()}

    async def _rewind(self, command: Command) -> dict[str, Any]:
        snapshot = base64.b64decode(command["snapshot"])
        return {"position": await _result(self._sessions[command["session"]].rewind(snapshot))}

    async def _close(self, command: Command) -> dict[str, Any]:
        await _result(self._sessions[command["session"]].close())
        return {}

    async def _disconnect(self, command: Command) -> dict[str, Any]:
        for stream in self._streams.values():
            await _result(stream.disconnect())
        return {}


async def _result(value: Any) -> Any:
    """The result of a call, synchronous or not."""
    return await value if inspect.isawaitable(value) else value


def _code(error: errors.UnrollError) -> str:
    if isinstance(error, errors.ServerError):
        return error.code
    if isinstance(error, errors.ConnectionFailed):
        return "connection_failed"
    return "invalid_input" if isinstance(error, errors.InvalidInput) else "unexpected_answer"


def _numbers(values: Any) -> Any:
    """Replace null by NaN."""
    if isinstance(values, dict):
        return {name: _numbers(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return float("nan") if values is None else values


def _lists(outputs: Any) -> Any:
    if isinstance(outputs, dict):
        return {name: array.tolist() for name, array in outputs.items()}
    return outputs.tolist()


async def drive(driver: PythonDriver) -> None:
    """Answer commands from stdin on stdout until stdin ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await driver.do(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(drive(PythonDriver(unroll.AsyncClient if "--asynchronous" in sys.argv else unroll.Client)))
