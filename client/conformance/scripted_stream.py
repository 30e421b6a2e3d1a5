"""A WebSocket connection of the scripted server."""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import WSMsgType, web

from unroll.client.conformance.frames import Chunk, Outputs, read_steps, write_outputs
from unroll.client.conformance.refusals import Refusal
from unroll.client.conformance.script import Rule
from unroll.client.conformance.scripted_rollouts import StreamRollouts
from unroll.client.conformance.toy_models import ToyModel
from unroll.client.conformance.toy_sessions import ToySession

if TYPE_CHECKING:
    from unroll.client.conformance.scripted_server import ScriptedServer

_TOO_LARGE, _RESTART = 1009, 1012
_NOBODY = 4_000_000_000
#: Bytes per fragment, for short and for long messages.
_PIECE, _LONG_PIECE = 7, 1000


class ScriptedStream:
    """One connection, with its sessions by handle."""

    def __init__(self, server: "ScriptedServer", model: ToyModel) -> None:
        self._server = server
        self._script = server.script
        self._model = model
        self.sessions: dict[int, ToySession] = {}
        self._socket = web.WebSocketResponse(timeout=1.0, max_msg_size=0, compress=False)
        self._transport: asyncio.Transport | None = None
        self._rollouts = StreamRollouts(server, self, model)
        self._operations: dict[str, Callable[[Any], Awaitable[None]]] = {
            "steps": self._json_steps,
            "rollout": self._rollouts.begin,
            "stop": self._stop,
        }

    async def run(self, request: web.Request) -> web.WebSocketResponse:
        await self._socket.prepare(request)
        self._transport = request.transport
        async for message in self._socket:
            if message.type is WSMsgType.TEXT:
                await self._control(message.data)
            elif message.type is WSMsgType.BINARY:
                await self._frame(message.data)
            if self._is_cut:
                break
        await self._rollouts.close()
        return self._socket

    @property
    def _is_cut(self) -> bool:
        return self._transport is None or self._transport.is_closing() or self._socket.closed

    def cut(self) -> None:
        assert self._transport
        self._transport.abort()

    # ── control messages ─────────────────────────────────────────────────────────────────────────

    async def _control(self, text: str) -> None:
        acts: dict[str, Callable[[Any], dict[str, Any]]]
        acts = {"open": self._open, "close": self._close, "detach": self._detach}
        try:
            document = json.loads(text)
            if (operation := self._operations.get(document["op"])) is not None:
                await operation(document)
                return
            op, items = document["op"], document["sessions" if document["op"] == "open" else "handles"]
            act = acts[op]
        except (ValueError, KeyError, TypeError) as error:
            self._script.faults.append(f"a control message that is none: {error!r}: {text[:200]}")
            await self.say({"op": "error", "code": "malformed_request", "detail": f"no control message: {error}"})
            return
        kind = f"stream-{op}"
        rules = {rule.does: rule for rule in self._script.meets(kind)}
        if await self.before(rules, None):
            return
        found = []
        for item in items:
            handle = item["handle"] if op == "open" else item
            self._script.comes(kind, handle)
            if op != "open":
                await self._rollouts.stop(handle)
            try:
                if (rule := rules.get("refuse")) is not None and (not rule.handles or handle in rule.handles):
                    raise self.refused(rule, kind, handle)
                found.append({"handle": handle} | act(item))
            except Refusal as refusal:
                found.append({"handle": handle, "error": refusal.document})
        done = {"open": "opened", "close": "closed", "detach": "detached"}[op]
        members = {"handles": items} if op == "detach" else {"sessions": found}
        await self._answer(json.dumps({"op": done, **members}), rules)

    def refused(self, rule: Rule, kind: str, key: object) -> Refusal:
        if rule.retry_after is not None:
            self._script.asked_to_wait(kind, key, rule.retry_after)
        return rule.refusal()

    async def _stop(self, document: Mapping[str, Any]) -> None:
        handle = document["handle"]
        rules = {rule.does: rule for rule in self._script.meets("stream-stop")}
        if await self.before(rules, None):
            return
        await self._rollouts.stop(handle)
        await self._answer(json.dumps({"op": "stopped", "handle": handle}), rules)

    def _open(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Open a session or attach to one. Raises Refusal."""
        mode, session_id, handle = spec.get("mode", "new"), spec.get("session_id"), spec["handle"]
        if handle in self.sessions:
            raise Refusal("malformed_request", f"handle {handle} is bound already")
        sessions = self._server.sessions
        try:
            if mode == "new" or session_id is None:
                raise Refusal("session_unknown", "it is to be new")
            session = sessions.find(session_id)
        except Refusal as refusal:
            if mode == "resume" or refusal.code != "session_unknown":
                raise
            session = sessions.open(self._model, session_id, spec.get("durability"), static=spec.get("static"))
        session.depth = spec.get("depth", 1)
        self.sessions[handle] = session
        described = session.description()
        return {name: described[name] for name in ("session_id", "position", "model_version", "durability")}

    def _close(self, handle: int) -> dict[str, Any]:
        """Close a session. Raises Refusal."""
        session = self.sessions.pop(handle, None)
        if session is None:
            raise Refusal("malformed_request", f"handle {handle} is not bound")
        self._server.sessions.end(self._server.sessions.find(session.id), "session_closed")
        return {"position": session.position}

    def _detach(self, handle: int) -> dict[str, Any]:
        self.sessions.pop(handle, None)
        return {}

    # ── frames ───────────────────────────────────────────────────────────────────────────────────

    async def _frame(self, frame: bytes) -> None:
        rules = {rule.does: rule for rule in self._script.meets("frame")}
        try:
            chunks = read_steps(self._model, frame)
        except Refusal as refusal:
            self._script.faults.append(f"a frame that is none: {refusal}")
            await self.say({"op": "error", **refusal.document})
            return
        await self._chunks(chunks, rules, write_outputs)

    async def _json_steps(self, document: Mapping[str, Any]) -> None:
        """Apply a chunk in JSON. Raises KeyError if a member is missing."""
        rules = {rule.does: rule for rule in self._script.meets("frame")}
        handle, position = document["handle"], document.get("position")
        try:
            inputs = self._model.inputs_of_json(document["inputs"])
        except Refusal as refusal:
            await self.say({"op": "error", "handle": handle, "position": position, **refusal.document})
            return
        await self._chunks([Chunk(handle, len(inputs[0]), position, inputs)], rules, self._json_outputs)

    def _json_outputs(self, entries: Sequence[Outputs], flags: int = 0) -> str:
        ((handle, _, end, outputs),) = entries
        members = {"handle": handle, "position": end, "outputs": self._model.json_of(outputs)}
        return json.dumps({"op": "outputs", **members, "reply_kept": not flags, "batch_rows": 1})

    async def _chunks(
        self, chunks: Sequence[Chunk], rules: Mapping[str, Rule], write: Callable[..., str | bytes]
    ) -> None:
        if await self.before(rules, self.sessions.get(chunks[0].handle)):
            return
        if (rule := rules.get("malformed")) is not None:
            await self.say({"op": "error", "code": rule.code, "detail": "the script refuses the whole message"})
            return
        outputs: list[Outputs] = []
        for chunk in chunks:
            try:
                outputs.append(self._apply(chunk, rules.get("refuse")))
            except Refusal as refusal:
                entry = {"handle": chunk.handle, "position": chunk.position}
                await self.say({"op": "error", **entry, **refusal.document})
        if outputs and "split" in rules:
            for each in reversed(outputs):
                await self._answer(write([each]), rules)
        elif outputs:
            await self._answer(write(outputs, flags=1 if "unkept" in rules else 0), rules)

    def _apply(self, chunk: Chunk, refuse: Rule | None) -> Outputs:
        """Apply a chunk. Raises Refusal."""
        bound = self.sessions.get(chunk.handle)
        if bound is None:
            raise Refusal("malformed_request", f"handle {chunk.handle} is not bound")
        self._script.comes("frame", bound.id)
        session = self._server.sessions.find(bound.id)
        if refuse is not None and (not refuse.handles or chunk.handle in refuse.handles):
            raise self.refused(refuse, "frame", bound.id)
        if not all(np.isfinite(array).all() for array in chunk.inputs):
            raise Refusal("non_finite_input", "the inputs contain NaN or infinity")
        if chunk.position is None:
            self._script.faults.append("a chunk came without its position")
        reply = session.apply(session.position if chunk.position is None else chunk.position, chunk.inputs)
        return chunk.handle, chunk.steps, reply.end, reply.outputs

    # ── the script's actions ─────────────────────────────────────────────────────────────────────

    async def before(self, rules: Mapping[str, Rule], session: ToySession | None) -> bool:
        """Apply the actions that precede processing. Returns whether the message is dropped."""
        if "cut-before" in rules:
            self.cut()
        if (rule := rules.get("restart")) is not None and not rule.after:
            await self._server.restart(rule)
        for does in ("end", "move"):
            if does in rules and session is not None:
                self._server.disturb(rules[does], session)
        if "noise" in rules:
            await self.say({"op": "notice", "detail": "an operation of a later version"})
            await self._socket.ping(b"are you there")
        if "stray" in rules:
            await self._socket.send_bytes(self._stray_outputs())
        if "closing" in rules:
            await self.say({"op": "closing", "sessions": self._whereabouts()})
            await self._socket.close(code=_RESTART)
        if "too-large" in rules:
            await self._socket.close(code=_TOO_LARGE)
        return self._is_cut

    def _stray_outputs(self) -> bytes:
        """Outputs for a handle that is no longer bound."""
        outputs = self._model.outputs_of([77.0], 7)
        return write_outputs([(_NOBODY, 1, 8, outputs)])

    def _whereabouts(self) -> list[dict[str, Any]]:
        return [
            {"handle": handle, "session_id": session.id, "position": session.position}
            for handle, session in self.sessions.items()
        ]

    async def _answer(self, message: str | bytes, rules: Mapping[str, Rule]) -> None:
        if (rule := rules.get("late")) is not None:
            await asyncio.sleep(rule.seconds)
        if "cut-after" in rules:
            self.cut()
        for _ in range(2 if "twice" in rules else 1):
            if "cut-inside" in rules and not self._is_cut:
                await self.send_in_pieces(message, whole=False)
            else:
                await self.send(message, in_pieces="pieces" in rules)

    async def send(self, message: str | bytes, *, in_pieces: bool) -> None:
        if self._is_cut:
            return
        if in_pieces:
            await self.send_in_pieces(message, whole=True)
        elif isinstance(message, str):
            await self._socket.send_str(message)
        else:
            await self._socket.send_bytes(message)

    async def say(self, document: Mapping[str, Any]) -> None:
        if not self._is_cut:
            await self._socket.send_str(json.dumps(document))

    async def send_in_pieces(self, message: str | bytes, *, whole: bool) -> None:
        """Send a message in several fragments, or only the first half of them."""
        assert self._transport
        content = message.encode() if isinstance(message, str) else message
        size = _PIECE if len(content) < _LONG_PIECE else _LONG_PIECE
        pieces = [content[begin : begin + size] for begin in range(0, len(content), size)]
        for index, piece in enumerate(pieces):
            if not whole and 2 * index >= len(pieces):
                self._transport.close()
                return
            first = (1 if isinstance(message, str) else 2) if index == 0 else 0
            last = 0x80 if index == len(pieces) - 1 else 0
            length = bytes([len(piece)]) if len(piece) < 126 else b"\x7e" + struct.pack(">H", len(piece))
            if index:
                await asyncio.sleep(0.002)
            self._transport.write(bytes([first | last]) + length + piece)
