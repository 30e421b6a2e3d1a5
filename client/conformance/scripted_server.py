"""The scripted server: HTTP and WebSocket on one port, with the actions of a script."""

import asyncio
import base64
import json
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from unroll.client.conformance.refusals import STATUS, Refusal
from unroll.client.conformance.script import Rule, Script
from unroll.client.conformance.scripted_rollouts import send_events
from unroll.client.conformance.scripted_stream import ScriptedStream
from unroll.client.conformance.snapshots import read_snapshot, seal, unseal
from unroll.client.conformance.toy_models import MODELS
from unroll.client.conformance.toy_rollouts import ToyRollout
from unroll.client.conformance.toy_sessions import ToySession, ToySessions, model_of

_HOST = "127.0.0.1"
_RAW = "application/octet-stream"
_ROUTES = (
    *(("GET", "", "models"), ("GET", "/{model}", "model"), ("POST", "/{model}/sequences", "sequences")),
    *(("POST", "/{model}/sessions", "open"), ("GET", "/{model}/sessions/{id}", "get")),
    *(("DELETE", "/{model}/sessions/{id}", "close"), ("POST", "/{model}/sessions/{id}/steps", "steps")),
    *(("POST", "/{model}/sessions/{id}/fork", "fork"), ("GET", "/{model}/sessions/{id}/state", "save")),
    ("POST", "/{model}/sessions/{id}/rollout", "rollout"),
    *(("PUT", "/{model}/sessions/{id}/state", "restore"), ("GET", "/{model}/stream", "upgrade")),
)
#: Actions that answer something other than a stream or events.
_UNLIKE = {"refuse", "redirect", "foreign"}
_PAGE = b"<!doctype html><title>Sign in</title>\n\n<p>This is the page of a proxy."


@dataclass
class Answer:
    """An HTTP response."""

    body: bytes
    status: int = 200
    media_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, document: Any, status: int = 200) -> "Answer":
        return cls(json.dumps(document).encode(), status)

    @classmethod
    def refusal(cls, refusal: Refusal, status: int = 0, retry_after: float | None = None) -> "Answer":
        status = status or STATUS.get(refusal.code, 400)
        document = {"type": "about:blank", "title": refusal.code, "status": status, **refusal.document}
        headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
        return cls(json.dumps(document).encode(), status, "application/problem+json", headers)


class ScriptedServer:
    """Listens on a local port until `stop`. `begin` starts the next conversation."""

    def __init__(self) -> None:
        self.script = Script()
        self.sessions = ToySessions()
        self.port = 0
        self._connections: set[asyncio.Transport] = set()
        self._streams: set[asyncio.Transport] = set()
        self._reserved = socket.socket()
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        for method, path, kind in _ROUTES:
            app.router.add_route(method, f"/v1/models{path}", self._handler(kind))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind((_HOST, 0))  # keeps the port reserved during a restart
        self.port = self._reserved.getsockname()[1]
        await self._listen()

    async def stop(self) -> None:
        assert self._runner
        self._cut(self._connections | self._streams)
        if self._starting is not None:
            await self._starting
        await self._runner.cleanup()
        self._reserved.close()

    async def begin(self, rules: Sequence[Rule], given: Mapping[str, int]) -> None:
        """Start a conversation with only the given sessions open, by id and position."""
        self._cut(self._streams)
        if self._starting is not None:
            await self._starting
        self.script, self.sessions = Script(rules), ToySessions()
        for session_id, position in given.items():
            self.sessions.open(MODELS["toy"], session_id).move(position)

    async def _listen(self) -> None:
        assert self._runner
        self._site = web.TCPSite(self._runner, _HOST, self.port, reuse_port=True)
        await self._site.start()

    async def restart(self, rule: Rule) -> None:
        """Simulate a process that is killed, and started again after some seconds."""
        assert self._site
        self.sessions.restart(kept=rule.kept)
        if rule.seconds:
            await self._site.stop()
            self._starting = asyncio.create_task(self._listen_after(rule.seconds))
        self._cut(self._connections | self._streams)

    async def _listen_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._listen()

    def _cut(self, connections: set[asyncio.Transport]) -> None:
        for transport in connections:
            transport.abort()
        self._connections -= connections
        self._streams -= connections

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────

    def _handler(self, kind: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            transport = request.transport
            assert transport
            (self._streams if kind == "upgrade" else self._connections).add(transport)
            body = await request.read()
            self.script.comes(kind, request.match_info.get("id", ""))
            rules = {rule.does: rule for rule in self.script.meets(kind)}
            for rule in rules.values():
                await self._before(rule, request, transport)
            if transport.is_closing():
                return web.Response()
            try:
                if kind == "upgrade" and not rules.keys() & _UNLIKE:
                    return await ScriptedStream(self, model_of(request.match_info["model"])).run(request)
                if kind == "rollout" and not any(rule.does in _UNLIKE and not rule.after for rule in rules.values()):
                    return await self._roll_out(request, body, rules)
                answer = self._answer(kind, request, body, rules)
            except Refusal as refusal:
                answer = Answer.refusal(refusal)
            return await self._send(request, transport, answer, rules)

        return handle

    async def _before(self, rule: Rule, request: web.Request, transport: asyncio.Transport) -> None:
        """Apply the actions that precede processing of the request."""
        if rule.does == "cut-before":
            transport.abort()
        elif rule.does == "restart" and not rule.after:
            await self.restart(rule)
        elif rule.does in {"end", "move"}:
            self.disturb(rule, self.sessions.find(request.match_info["id"]))

    def disturb(self, rule: Rule, session: ToySession) -> None:
        if rule.does == "end":
            self.sessions.end(session, rule.code)
        else:
            session.move(rule.steps)

    def _answer(self, kind: str, request: web.Request, body: bytes, rules: Mapping[str, Rule]) -> Answer:
        """Answer a request, with the script's changes. Raises Refusal."""
        if (rule := rules.get("refuse")) is not None:
            return self._refused(rule, kind, request)
        if (rule := rules.get("redirect")) is not None:
            return Answer(b"", 308, headers={"Location": f"{self.url}/sign-in"})
        if (rule := rules.get("foreign")) is not None:
            return Answer(_PAGE, rule.status or 200, "text/html")
        answer: Answer = getattr(self, f"_{kind}")(request, body)
        if "short" in rules:
            answer.body = answer.body[:-4]
        if "no-position" in rules:
            answer.headers.pop("Unroll-Position")
        if (rule := rules.get("refuse-after")) is not None:
            return self._refused(rule, kind, request)
        return answer

    def _refused(self, rule: Rule, kind: str, request: web.Request) -> Answer:
        if rule.retry_after is not None:
            self.script.asked_to_wait(kind, request.match_info.get("id", ""), rule.retry_after)
        return Answer.refusal(Refusal(rule.code, f"the script refuses with {rule.code}"), rule.status, rule.retry_after)

    async def _send(
        self, request: web.Request, transport: asyncio.Transport, answer: Answer, rules: Mapping[str, Rule]
    ) -> web.StreamResponse:
        if (rule := rules.get("late")) is not None:
            await asyncio.sleep(rule.seconds)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.content_type = answer.media_type
        if "cut-after" in rules:
            transport.abort()
        if transport.is_closing():
            return response
        if "chunked" in rules:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(answer.body)
        await response.prepare(request)
        if "cut-inside" in rules:
            await response.write(answer.body[: len(answer.body) // 2])
            transport.close()
            return response
        size = 3 if rules.keys() & {"pieces", "chunked"} else len(answer.body) or 1
        for begin in range(0, len(answer.body), size):
            await response.write(answer.body[begin : begin + size])
            await asyncio.sleep(0.002)
        await response.write_eof()
        if "close-idle" in rules:
            transport.close()
        return response

    # ── operations ───────────────────────────────────────────────────────────────────────────────

    def _models(self, request: web.Request, body: bytes) -> Answer:
        return Answer.json([model.description() for model in MODELS.values()])

    def _model(self, request: web.Request, body: bytes) -> Answer:
        return Answer.json(model_of(request.match_info["model"]).description())

    def _sequences(self, request: web.Request, body: bytes) -> Answer:
        model = model_of(request.match_info["model"])
        if request.content_type == _RAW:
            inputs = model.inputs_of_raw(body, int(request.headers["Unroll-Steps"]))
            outputs = model.outputs_of(model.states(model.first_state(None), inputs), 0)
            return Answer(b"".join(array.tobytes() for array in outputs), media_type=_RAW)
        document = _document(body)
        given, static = document["inputs"], document.get("static", {})
        named = given if isinstance(given, dict) else {model.inputs[0].name: given}
        rows: list[Any] = []
        for row in range(len(next(iter(named.values())))):
            inputs = model.inputs_of_json({name: values[row] for name, values in named.items()})
            first = model.first_state({name: values[row] for name, values in static.items()})
            rows.append(model.json_of(model.outputs_of(model.states(first, inputs), 0)))
        several = len(model.outputs) > 1
        by_name = {spec.name: [row[spec.name] for row in rows] for spec in model.outputs} if several else rows
        return Answer.json({"outputs": by_name})

    def _open(self, request: web.Request, body: bytes) -> Answer:
        model = model_of(request.match_info["model"])
        document = _document(body) if request.content_type != _RAW else {}
        content = body if request.content_type == _RAW else base64.b64decode(document.get("snapshot", ""))
        session = self.sessions.open(
            model,
            document.get("session_id"),
            document.get("durability"),
            static=document.get("static"),
            snapshot=content or None,
        )
        described = session.description()
        if session.durability == "client":
            described["snapshot"] = base64.b64encode(seal(session.id, session.snapshot())).decode()
        return Answer.json(described, 201)

    def _get(self, request: web.Request, body: bytes) -> Answer:
        return Answer.json(self._session(request).description())

    def _close(self, request: web.Request, body: bytes) -> Answer:
        session = self._session(request)
        self.sessions.end(session, "session_closed")
        return Answer.json(session.description())

    def _fork(self, request: web.Request, body: bytes) -> Answer:
        fork = self.sessions.fork(self._session(request), _document(body).get("session_id"))
        return Answer.json(fork.description(), 201)

    def _save(self, request: web.Request, body: bytes) -> Answer:
        session = self._session(request)
        return Answer(session.snapshot(), 200, _RAW, {"Unroll-Position": str(session.position)})

    def _restore(self, request: web.Request, body: bytes) -> Answer:
        session = self._session(request)
        session.position, state = read_snapshot(body, session.model.digest)
        session.states = {session.position: state}
        session.replies.clear()
        return Answer.json(session.description())

    def _steps(self, request: web.Request, body: bytes) -> Answer:
        headers = request.headers
        is_raw = request.content_type == _RAW
        document = {} if is_raw else _document(body)
        position = document.get("position", headers.get("Unroll-Position"))
        length = headers.get("Unroll-Snapshot-Length")
        sealed = body[: int(length)] if length else base64.b64decode(document.get("snapshot", ""))
        session = self._held(request, sealed) if sealed else self._session(request)
        if is_raw:
            inputs = session.model.inputs_of_raw(body[int(length or 0) :], int(headers.get("Unroll-Steps", "1")))
        else:
            inputs = session.model.inputs_of_json(document.get("inputs"))
        if position is None:
            self.script.faults.append("a chunk came without its position")
            position = session.position
        reply = session.apply(int(position), inputs)
        again = seal(session.id, session.snapshot()) if sealed else b""
        fields = {"Unroll-Position": str(reply.end)}
        if not is_raw:
            members = {"snapshot": base64.b64encode(again).decode()} if sealed else {}
            outputs = session.model.json_of(reply.outputs)
            return Answer(json.dumps({"outputs": outputs, "position": reply.end, **members}).encode(), headers=fields)
        if sealed:
            fields["Unroll-Snapshot-Length"] = str(len(again))
        return Answer(again + b"".join(array.tobytes() for array in reply.outputs), 200, _RAW, fields)

    async def _roll_out(self, request: web.Request, body: bytes, rules: Mapping[str, Rule]) -> web.StreamResponse:
        """Answer with a rollout. Raises Refusal."""
        wish = _document(body)
        sealed = base64.b64decode(wish.pop("snapshot", None) or "")
        session = self._held(request, sealed) if sealed else self._session(request)
        if "Unroll-Position" in request.headers:
            wish.setdefault("position", int(request.headers["Unroll-Position"]))
        return await send_events(self, request, session.model, ToyRollout(session, wish), rules)

    def _session(self, request: web.Request) -> ToySession:
        model_of(request.match_info["model"])
        return self.sessions.find(request.match_info["id"])

    def _held(self, request: web.Request, sealed: bytes) -> ToySession:
        """A client-held session, from its sealed snapshot."""
        model, session_id = model_of(request.match_info["model"]), request.match_info["id"]
        return ToySessions().open(model, session_id, "client", snapshot=unseal(session_id, sealed))


def _document(body: bytes) -> dict[str, Any]:
    """Parse a JSON body. Raises Refusal."""
    try:
        document = json.loads(body or b"{}")
    except ValueError as error:
        raise Refusal("malformed_request", f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Refusal("malformed_request", "the body is no JSON object")
    return document
