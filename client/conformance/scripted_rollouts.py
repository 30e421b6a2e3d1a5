"""Rollouts of the scripted server, as server-sent events and on streams, with the script's actions."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from unroll.client.conformance.frames import write_rolled
from unroll.client.conformance.refusals import STATUS, Refusal
from unroll.client.conformance.script import Rule
from unroll.client.conformance.toy_models import ToyModel
from unroll.client.conformance.toy_rollouts import ToyRollout

if TYPE_CHECKING:
    from unroll.client.conformance.scripted_server import ScriptedServer
    from unroll.client.conformance.scripted_stream import ScriptedStream

#: Actions that end a rollout.
_ENDS = {"cut-inside", "hold", "restart", "refuse"}
#: Bytes per piece of an event, and the interval in seconds for polling a connection that the client should close.
_PIECE, _LOOK = 7, 0.01


class _Outlet(Protocol):
    """The destination of a rollout. Sending on a closed connection does nothing."""

    async def send(self, message: Any) -> None: ...
    async def send_half(self, message: Any) -> None: ...
    async def fail(self, refusal: Refusal) -> None: ...
    async def until_ended(self) -> None:
        """Wait until the client ends the rollout."""

    def cut(self) -> None: ...


async def _send(
    server: "ScriptedServer",
    rollout: ToyRollout,
    messages: Sequence[str | bytes],
    outlet: _Outlet,
    rules: Mapping[str, Rule],
) -> None:
    """Send the messages of a rollout's pieces and of its end. The rollout is applied even if they are lost."""
    server.script.stepped.clear()
    if not rollout.is_placed:
        server.script.faults.append("a rollout on the session came without its position")
    if not any(rule.does in _ENDS and rule.after < len(rollout.pieces) for rule in rules.values()):
        rollout.apply()
    if "cut-after" in rules:
        outlet.cut()
    for count, message in enumerate(messages):
        for rule in [each for each in rules.values() if each.after == count]:
            if rule.does == "late":
                await asyncio.sleep(rule.seconds)
            elif rule.does == "await-step":
                await server.script.await_step(outlet.until_ended())
            elif rule.does == "cut-inside":
                await outlet.send_half(message)
            elif rule.does == "restart":
                await server.restart(rule)
            elif rule.does == "refuse":
                await outlet.fail(rule.refusal())
            elif rule.does == "hold":
                ended = server.script.hold()
                await outlet.until_ended()
                ended.set_result(None)
                await outlet.send(message)  # it was already on its way
            if rule.does in _ENDS:
                return
        await outlet.send(message)


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────


async def send_events(
    server: "ScriptedServer", request: web.Request, model: ToyModel, rollout: ToyRollout, rules: Mapping[str, Rule]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    response.enable_chunked_encoding()
    transport = request.transport
    assert transport
    outlet = _Events(response, transport, in_pieces="pieces" in rules)
    messages = [_event("steps", piece.document(model)) for piece in rollout.pieces]
    messages.append(_event("end", {"position": rollout.end, "reply_kept": True}))
    await response.prepare(request)
    await _send(server, rollout, messages, outlet, rules)
    if not transport.is_closing():
        await response.write_eof()
    return response


def _event(name: str, document: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()


class _Events:
    """Sends a rollout as server-sent events."""

    def __init__(self, response: web.StreamResponse, transport: asyncio.Transport, *, in_pieces: bool) -> None:
        self._response = response
        self._transport = transport
        self._in_pieces = in_pieces

    async def send(self, message: bytes) -> None:
        size = _PIECE if self._in_pieces else len(message)
        for begin in range(0, len(message), size):
            if not self._transport.is_closing():
                await self._response.write(message[begin : begin + size])
                await asyncio.sleep(0.002 if self._in_pieces else 0)

    async def send_half(self, message: bytes) -> None:
        await self.send(message[: len(message) // 2])
        self._transport.close()

    async def fail(self, refusal: Refusal) -> None:
        await self.send(_event("error", {"status": STATUS.get(refusal.code, 400), **refusal.document}))

    async def until_ended(self) -> None:
        while not self._transport.is_closing():  # noqa: ASYNC110 there is no event to wait for
            await asyncio.sleep(_LOOK)

    def cut(self) -> None:
        self._transport.abort()


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


class StreamRollouts:
    """The rollouts on one connection, by handle."""

    def __init__(self, server: "ScriptedServer", stream: "ScriptedStream", model: ToyModel) -> None:
        self._server = server
        self._stream = stream
        self._model = model
        self._running: dict[int, tuple[asyncio.Task[None], _Handle]] = {}

    async def begin(self, document: Mapping[str, Any]) -> None:
        handle, script = document["handle"], self._server.script
        rules = {rule.does: rule for rule in script.meets("stream-rollout")}
        bound = self._stream.sessions.get(handle)
        if await self._stream.before(rules, bound):
            return
        outlet = _Handle(self._stream, document, in_pieces="pieces" in rules)
        try:
            if bound is None or handle in self._running:
                raise Refusal("malformed_request", f"handle {handle} is not bound, or is rolled out already")
            session = self._server.sessions.find(bound.id)
            script.comes("stream-rollout", bound.id)
            if (rule := rules.get("refuse")) is not None and not rule.after:
                raise self._stream.refused(rule, "stream-rollout", bound.id)
            members = {name: value for name, value in document.items() if name not in ("op", "handle", "values")}
            rollout = ToyRollout(session, members)
        except Refusal as refusal:
            await outlet.fail(refusal)
            return
        messages = self._messages(handle, rollout, in_json=document.get("values") == "json")
        sending = asyncio.create_task(_send(self._server, rollout, messages, outlet, rules))
        self._running[handle] = sending, outlet
        sending.add_done_callback(lambda _: self._running.pop(handle, None))

    def _messages(self, handle: int, rollout: ToyRollout, *, in_json: bool) -> list[str | bytes]:
        messages: list[str | bytes] = [
            json.dumps({"op": "rolling", "handle": handle, **piece.document(self._model)})
            if in_json
            else write_rolled(handle, piece)
            for piece in rollout.pieces
        ]
        end = {"op": "rolled", "handle": handle, "position": rollout.end, "reply_kept": True}
        return [*messages, json.dumps(end)]

    async def stop(self, handle: int) -> None:
        """Stop a rollout. A message that is already on its way is still sent."""
        if handle in self._running:
            sending, outlet = self._running[handle]
            outlet.ended.set()
            await sending

    async def close(self) -> None:
        """Stop all rollouts when the connection is gone."""
        for handle in list(self._running):
            await self.stop(handle)


class _Handle:
    """Sends a rollout on a stream. `document` is its request; `ended` is set when the client has stopped it."""

    def __init__(self, stream: "ScriptedStream", document: Mapping[str, Any], *, in_pieces: bool) -> None:
        self._stream = stream
        self._entry = {"handle": document["handle"], "position": document.get("position"), "rollout": True}
        self._in_pieces = in_pieces
        self.ended = asyncio.Event()
        self.cut = stream.cut

    async def send(self, message: str | bytes) -> None:
        await self._stream.send(message, in_pieces=self._in_pieces)

    async def send_half(self, message: str | bytes) -> None:
        await self._stream.send_in_pieces(message, whole=False)

    async def until_ended(self) -> None:
        await self.ended.wait()

    async def fail(self, refusal: Refusal) -> None:
        await self._stream.say({"op": "error", **self._entry, **refusal.document})
