"""One connection of a stream: its messages, its sessions, and the work and the answers of its frames.

It is the protocol and nothing else: it gets messages, answers through a `Link`, never waits, and knows no web server.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from unroll.service.api import session_operations
from unroll.service.api.app_state import AppState
from unroll.service.api.parameters import require_streamable, split_reference
from unroll.service.api.request import ATTEMPTS
from unroll.service.api.session_operations import new_id
from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.link import Link
from unroll.service.api.stream.replies import CallSoon, Replies, error_members
from unroll.service.catalog.model import ServedModel
from unroll.service.core import failpoints
from unroll.service.core.errors import (
    BodyTooLarge,
    CapacityExhausted,
    InvalidRequest,
    ModelChanged,
    NeedsStoreLookup,
    QueueFull,
    SessionClosed,
    SessionContended,
    SessionUnknown,
    UnrollError,
)
from unroll.service.engine.engine import Tensors
from unroll.service.protocol.frames import (
    NO_POSITION,
    Frame,
    FrameCodec,
    SingleEntryFrame,
)
from unroll.service.scheduler.chunk import Action, Chunk, GroupReply
from unroll.service.scheduler.reply import Outcome
from unroll.service.scheduler.session import Cohort, Life, Session

T = TypeVar("T")

#: Sessions bound to one connection at a time, and in one `open`.
MAX_HANDLES = 65_536
#: Kinds of frames of a connection that are recognised when they come again.
MAX_LINEUPS = 16
#: Sessions that are opened or closed in one turn of the event loop.
SLICE = 256
#: Close code of a stream whose server ends: RFC 6455's registry calls it Service Restart.
RESTART = 1012

Handle = Annotated[int, Field(ge=0, lt=2**32)]


class _Control(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Wanted(_Control):
    handle: Handle
    session_id: str | None = None
    mode: Literal["new", "resume", "either"] = "new"
    durability: Literal["memory", "redis"] | None = None
    static: dict[str, Any] | None = None
    depth: Annotated[int, Field(ge=1, le=64)] = 1


class _Open(_Control):
    op: Literal["open"]
    sessions: Annotated[list[_Wanted], Field(min_length=1, max_length=MAX_HANDLES)]


class _Handles(_Control):
    op: Literal["close", "detach"]
    handles: Annotated[list[Handle], Field(min_length=1, max_length=MAX_HANDLES)]


_CONTROL: TypeAdapter[_Open | _Handles] = TypeAdapter(Annotated[_Open | _Handles, Field(discriminator="op")])


@dataclass(slots=True, eq=False)
class _Waiting:
    """A chunk of this connection that is not answered. said: as the client sent it. alone: its frame's only one. left:
    how often it may be submitted anew, if its session turns out to be moved on elsewhere."""

    stream: "Connection"
    served: ServedModel
    session: Session
    said: SingleEntryFrame
    alone: bool
    left: int
    chunk: Chunk | None = None

    def __call__(self, outcome: Outcome) -> None:
        self.stream._settled(self, outcome)


@dataclass(slots=True, eq=False)
class _Lineup:
    """Whose steps a frame had, which most likely will come together again. served: the version they are all on, if they
    are. cohorts: theirs, in the frame's order."""

    served: ServedModel | None = None
    cohorts: list[Cohort] = field(default_factory=list)


class Connection:
    """Gets what the link receives.

    Args:
        server: the state of the app.
        model: `name` or `name:version`.
        link: the connection, which need not be accepted yet.
        call_soon: calls a function in the next turn of the event loop.

    Raises:
        ModelUnknown: there is no such model.
        NotStreamable: it serves whole sequences only.
        Draining: the server is about to end.
    """

    def __init__(self, server: AppState, model: str, link: Link, call_soon: CallSoon) -> None:
        server.refuse_if_draining()
        self._server = server
        self._keeper = server.catalog.keeper
        self._model = model
        self._name, self._version = split_reference(model)
        served = server.catalog.resolve(self._name, self._version)
        require_streamable(served)
        self._inputs, self._outputs = served.manifest.inputs, served.manifest.outputs
        self._codec = FrameCodec(self._inputs, served.codec.max_steps)
        self._hang_up = link.close
        self._call_soon = call_soon
        #: What each handle means: one session, and not another that is opened under its id later.
        self._bound: dict[ServedModel, dict[int, Session]] = {}
        self._handles = 0
        self._opening: set[int] = set()  # handles of sessions that are being brought in
        self._lineups: dict[bytes, _Lineup] = {}  # by `Frame.signature`
        self._held: deque[tuple[Callable[[bytes], None], bytes]] = deque()  # messages behind one that takes long
        self._working = False  # on that one
        self._apart: asyncio.Future[None] | None = None  # which does
        self._waiting: dict[_Waiting, None] = {}
        step_bytes = sum(spec.nbytes for spec in self._outputs)
        self._flow = FlowControl(step_bytes, link.pause, link.resume, self._on_drained)
        self._replies = Replies(link, self._flow, call_soon)
        server.streams.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._replies.closed else self._flow.state
        return f"<Connection {self._model} {state}, {self._handles} sessions, {self._flow.entries} entries unanswered>"

    # ── what the transport calls ─────────────────────────────────────────────────────────────────

    def on_text(self, message: bytes) -> None:
        if self._flow.drained:
            return
        if self._working:
            self._held.append((self.on_text, message))
            return
        try:
            self._control(message)
        except InvalidRequest as error:
            self._replies.send_error(error)

    def on_binary(self, message: bytes) -> None:
        if self._flow.drained:
            return
        if self._working:
            self._held.append((self.on_binary, message))
            return
        failpoints.reach("recv")
        try:
            limit = self._server.limits.max_body_bytes
            if len(message) > limit:
                raise BodyTooLarge(f"a frame may have {limit} bytes, this one has {len(message)}")
            frame = self._codec.decode_single(message) or self._codec.decode(message)
        except InvalidRequest as error:
            self._replies.send_error(error)
            return
        if isinstance(frame, SingleEntryFrame):
            self._flow.acquire(1, frame.steps)
            self._submit(frame, self._codec.fault(frame.inputs), alone=True)
        else:
            self._flow.acquire(len(frame.entries), frame.total)
            self._submit_all(frame)
        self._flow.update()

    def on_writable(self, writable: bool) -> None:
        """Does the client read, or is what it does not read piling up?"""
        self._flow.writable = writable
        self._flow.update()

    def drain(self) -> None:
        """Read no more, answer what was read, say where each session is, and hang up."""
        self._flow.draining = True
        self._flow.update()

    def close(self) -> None:
        """The connection is gone; its sessions stay. What has not begun to run is dropped, the last first."""
        self._server.streams.discard(self)
        self._replies.close()
        for waiting in reversed([*self._waiting]):
            if waiting.chunk is not None:
                waiting.served.loop.leave(waiting.chunk, waiting)
        self._waiting.clear()
        self._held.clear()
        self._lineups.clear()
        self._flow.clear()

    # ── control ──────────────────────────────────────────────────────────────────────────────────

    def _control(self, message: bytes) -> None:
        """Raises InvalidRequest; nothing was done then."""
        limit = self._server.limits.max_json_bytes
        if len(message) > limit:
            raise BodyTooLarge(f"a text message may have {limit} bytes, this one has {len(message)}")
        try:
            asked = _CONTROL.validate_json(message)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise InvalidRequest(f"{'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}") from error
        if isinstance(asked, _Open):
            if self._keeper is None:
                self._work("opened", [], map(self._open, asked.sessions))
            else:
                self._work_apart("opened", asked.sessions, self._bring_in)
        elif asked.op == "close":
            if self._keeper is None:
                self._work("closed", [], map(self._end, asked.handles))
            else:
                self._work_apart("closed", asked.handles, self._end_everywhere)
        else:
            if unknown := [handle for handle in asked.handles if self._find(handle) is None]:
                raise InvalidRequest(f"no session is bound to handle {unknown[0]}", handle=unknown[0])
            for handle in asked.handles:
                self._unbind(handle)
            self._replies.send({"op": "detached", "handles": asked.handles})

    def _work(self, op: str, done: list[dict[str, Any]], rest: Iterator[dict[str, Any]]) -> None:
        """Do some of `rest` now and some each time the event loop comes round, then send what came of all."""
        part = list(islice(rest, SLICE))
        done += part
        self._working = len(part) == SLICE
        if self._working:
            self._call_soon(partial(self._go_on, op, done, rest))
            self._flow.busy = True
            self._flow.update()
        else:
            self._replies.send({"op": op, "sessions": done})

    def _go_on(self, op: str, done: list[dict[str, Any]], rest: Iterator[dict[str, Any]]) -> None:
        if not self._replies.closed:
            self._work(op, done, rest)
            self._take_held()

    def _work_apart(self, op: str, items: Sequence[T], do: Callable[[T], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        """The same for what has to ask the store, a slice at a time."""

        async def work() -> None:
            done: list[dict[str, Any]] = []
            for begin in range(0, len(items), SLICE):
                done += await asyncio.gather(*map(do, items[begin : begin + SLICE]))
            if not self._replies.closed:
                self._working, self._apart = False, None
                self._replies.send({"op": op, "sessions": done})
                self._take_held()

        self._working = self._flow.busy = True
        self._apart = asyncio.ensure_future(work())
        self._flow.update()

    def _take_held(self) -> None:
        while self._held and not self._working:
            take, message = self._held.popleft()
            take(message)
        self._flow.busy = self._working
        self._flow.update()

    def _find(self, handle: int) -> tuple[ServedModel, Session] | None:
        for served, bound in self._bound.items():
            if (session := bound.get(handle)) is not None:
                return served, session
        return None

    def _unbind(self, handle: int) -> None:
        for bound in self._bound.values():
            if bound.pop(handle, None) is not None:
                self._handles -= 1
                self._lineups.clear()

    def _open(self, wanted: _Wanted) -> dict[str, Any]:
        try:
            self._check_handle(wanted.handle)
            served, session = self._session(wanted)
        except UnrollError as error:
            return {"handle": wanted.handle, "error": error_members(error)}
        return self._bind(wanted, served, session)

    async def _bring_in(self, wanted: _Wanted) -> dict[str, Any]:
        """`_open` where there is a store."""
        try:
            self._check_handle(wanted.handle)
            self._opening.add(wanted.handle)
            try:
                served, session = await self._session_anywhere(wanted)
            finally:
                self._opening.remove(wanted.handle)
        except UnrollError as error:
            return {"handle": wanted.handle, "error": error_members(error)}
        return self._bind(wanted, served, session)

    def _check_handle(self, handle: int) -> None:
        if self._find(handle) is not None or handle in self._opening:
            raise InvalidRequest(f"handle {handle} is bound to a session")
        if self._handles + len(self._opening) >= MAX_HANDLES:
            raise CapacityExhausted(f"one connection holds {MAX_HANDLES} sessions: detach some, or use another")

    def _bind(self, wanted: _Wanted, served: ServedModel, session: Session) -> dict[str, Any]:
        served.scheduler.set_retry_depth(session, wanted.depth)
        self._bound.setdefault(served, {})[wanted.handle] = session
        self._handles += 1
        return {
            "handle": wanted.handle,
            "session_id": session.id,
            "position": session.position,
            "model_version": served.version,
            "durability": session_operations.describe(served, session)["durability"],
        }

    async def _session_anywhere(self, wanted: _Wanted) -> tuple[ServedModel, Session]:
        self._server.refuse_if_draining()
        _check_mode(wanted)
        if wanted.mode != "new" and wanted.session_id is not None:
            session_operations.check_id(wanted.session_id)
            try:
                served, session = await session_operations.find(self._server, self._model, wanted.session_id)
            except SessionUnknown:
                if wanted.mode == "resume":
                    raise
            else:
                self._check_tensors(served)
                return served, session
        self._check_tensors(self._server.catalog.resolve(self._name, self._version))
        return await session_operations.open_session(
            *(self._server, self._model, wanted.session_id), static=wanted.static, durability=wanted.durability
        )

    def _session(self, wanted: _Wanted) -> tuple[ServedModel, Session]:
        self._server.refuse_if_draining()
        _check_mode(wanted)
        session_operations.keeper_for(self._server, wanted.durability)  # says that there is none, if one is asked for
        if wanted.mode != "new" and wanted.session_id is not None:
            session_operations.check_id(wanted.session_id)
            try:
                served, session = session_operations.find_here(self._server, self._model, wanted.session_id)
            except SessionUnknown:
                if wanted.mode == "resume":
                    raise
            else:
                self._check_tensors(served)
                return served, session
        served = self._server.catalog.resolve(self._name, self._version)
        self._check_tensors(served)
        start = session_operations.start_of(served, static=wanted.static)
        return served, session_operations.begin(served, new_id(self._server, self._name, wanted.session_id), start)

    def _check_tensors(self, served: ServedModel) -> None:
        """Frames have one layout: the sessions may be of several versions, but these must agree on it."""
        if (served.manifest.inputs, served.manifest.outputs) != (self._inputs, self._outputs):
            raise ModelChanged(
                f"version {served.version} has other inputs or outputs than this connection's: "
                f"connect to {served.name}:{served.version}"
            )

    def _end(self, handle: int) -> dict[str, Any]:
        try:
            served, session = self._session_of(handle)
            self._unbind(handle)
            _check_here(served, session)
            served.scheduler.close(session, served.loop.clock.now())
        except UnrollError as error:
            return {"handle": handle, "error": error_members(error)}
        return {"handle": handle, "position": session.position}

    async def _end_everywhere(self, handle: int) -> dict[str, Any]:
        """`_end` where there is a store."""
        found = self._find(handle)
        if found is None or found[1].durable is None:
            return self._end(handle)
        bound = found[1]
        self._unbind(handle)
        try:
            _, session = await session_operations.find(self._server, self._name, bound.id)
            if session.origin != bound.origin:
                raise _another(bound)
            await session_operations.close(self._server, self._name, bound.id)
        except UnrollError as error:
            return {"handle": handle, "error": error_members(error)}
        return {"handle": handle, "position": session.position}

    def _session_of(self, handle: int) -> tuple[ServedModel, Session]:
        """Raises InvalidRequest, or what became of a session that lost its row."""
        found = self._find(handle)
        if found is None:
            raise InvalidRequest(f"no session is bound to handle {handle}")
        served, session = found
        if session.life is Life.GONE and session.origin is not None and session.durable is None:
            return self._bind_again(handle, session)
        return served, served.scheduler.sessions.detach_from_cohort(session)

    def _on_drained(self) -> None:
        self._take_leave(iter([handle for bound in self._bound.values() for handle in bound]))

    def _take_leave(self, handles: Iterator[int]) -> None:
        """Say where some of the sessions are, and where more are when the event loop comes round; then hang up."""
        if self._replies.closed:
            return
        if part := [self._whereabouts(handle) for handle in islice(handles, SLICE)]:
            self._replies.send({"op": "closing", "sessions": part})
            self._call_soon(partial(self._take_leave, handles))
        else:
            self._hang_up(RESTART, "the server is about to end: resume elsewhere")

    def _whereabouts(self, handle: int) -> dict[str, Any]:
        """Of a durable session, as far as is known here."""
        try:
            served, session = self._session_of(handle)
            if session.durable is None:
                _check_here(served, session)
        except UnrollError as error:
            return {"handle": handle, "error": error_members(error)}
        return {"handle": handle, "session_id": session.id, "position": session.position}

    # ── chunks ───────────────────────────────────────────────────────────────────────────────────

    def _submit_all(self, frame: Frame) -> None:
        """As cohorts what steps together time after time, else as one group what can be, and the rest one by one."""
        faults = self._codec.faults(frame)
        taken: set[int] = set()
        if frame.uniform_inputs is not None:
            lineup = self._lineup(frame)
            if not faults and self._submit_cohorts(frame, frame.uniform_inputs, lineup):
                return
            for served, bound in self._bound.items():
                rows, members = _members(bound, frame.handles, faults)
                if rows:
                    taken.update(self._submit_group(frame, served, rows, members, lineup))
        if len(taken) < len(frame.entries):
            for i, said in enumerate(zip(frame.handles, frame.steps, frame.positions, strict=True)):
                if i not in taken:
                    self._submit(SingleEntryFrame(*said, frame.chunk(i)), faults.get(i), alone=False)

    def _lineup(self, frame: Frame) -> _Lineup:
        who = frame.signature
        lineup = self._lineups.get(who)
        if lineup is None:
            if len(self._lineups) == MAX_LINEUPS:
                del self._lineups[next(iter(self._lineups))]
            lineup = self._lineups[who] = _Lineup()
        return lineup

    def _submit_cohorts(self, frame: Frame, inputs: Tensors, lineup: _Lineup) -> bool:
        """False if the frame's sessions are no cohorts, or cannot take this step as such."""
        served = lineup.served
        if served is None or sum(len(cohort.sessions) for cohort in lineup.cohorts) < len(frame.entries):
            return False
        said = frame.entries["position"]
        positions = None if said[0] == NO_POSITION and (said == NO_POSITION).all() else said
        then = partial(self._settled_group, frame, None, None)
        try:
            return served.loop.submit_cohorts(
                lineup.cohorts, positions, inputs, self._server.limits.request_timeout, then
            )
        except UnrollError as error:
            self._replies.refuse_all(frame.entries, error)
            return True

    def _submit_group(
        self, frame: Frame, served: ServedModel, rows: list[int], members: list[Session], lineup: _Lineup
    ) -> list[int]:
        """Returns the rows of the frame that are taken or refused."""
        assert frame.uniform_inputs is not None
        inputs, positions = frame.uniform_inputs, frame.positions
        whole = len(rows) == len(frame.entries)
        again = whole and lineup.served is served
        lineup.served, lineup.cohorts = served if whole else None, []
        if not whole:
            inputs = tuple(array[rows] for array in inputs)
            positions = [positions[i] for i in rows]
        then = partial(self._settled_group, frame, None if whole else rows, lineup)
        timeout = self._server.limits.request_timeout
        try:
            left = served.loop.submit_group(members, positions, inputs, timeout, then, again=again)
        except UnrollError as error:
            self._replies.refuse_all(frame.entries[rows], error)
            return rows
        if not left:
            return rows
        others = set(left)
        return [i for row, i in enumerate(rows) if row not in others]

    def _submit(self, said: SingleEntryFrame, fault: UnrollError | None, *, alone: bool, left: int = ATTEMPTS) -> None:
        try:
            if fault is not None:
                raise fault
            served, session = self._session_of(said.handle)
            if session.life is Life.GONE and session.durable is not None:
                served, session = self._bind_again(said.handle, session)
            if session.active is not None or session.life is not Life.OPEN:
                _check_here(served, session)
                _check_depth(session, said.position)
            waiting = _Waiting(self, served, session, said, alone, left)
            timeout = self._server.limits.request_timeout
            waiting.chunk = served.loop.submit(Chunk(said.inputs, session, said.position), timeout, waiting)
            if waiting.chunk is not None:
                self._waiting[waiting] = None
        except NeedsStoreLookup as away:
            self._look_up(away.session_id, said, alone, left)
        except UnrollError as error:
            self._replies.refuse(said.handle, said.steps, said.position, error)

    def _bind_again(self, handle: int, before: Session) -> tuple[ServedModel, Session]:
        """A session that lost its row here is brought back, or was. Raises NeedsStoreLookup, or what became of it."""
        if self._keeper and before.durable is not None and not self._keeper.is_verified(self._name, before.id):
            raise NeedsStoreLookup(before.id)
        served, session = session_operations.find_here(self._server, self._name, before.id)
        if session.origin != before.origin:
            raise _another(before)
        served.scheduler.set_retry_depth(session, before.depth)
        self._unbind(handle)
        self._bound.setdefault(served, {})[handle] = session
        self._handles += 1
        return served, session

    def _look_up(self, session_id: str, said: SingleEntryFrame, alone: bool, left: int) -> None:
        """Submit it again when the session was looked up, behind what waits for that already."""

        def then(error: UnrollError | None) -> None:
            if not self._replies.closed:
                self._submit(said, error, alone=alone, left=left - 1)

        assert self._keeper is not None
        self._keeper.fetch(self._name, session_id, then)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────

    def _settled(self, waiting: _Waiting, outcome: Outcome) -> None:
        if self._replies.closed:
            return
        self._waiting.pop(waiting, None)
        said = waiting.said
        if isinstance(outcome, SessionContended) and waiting.left and self._keeper is not None:
            self._look_up(waiting.session.id, said, waiting.alone, waiting.left)
        elif isinstance(outcome, UnrollError):
            self._replies.refuse(said.handle, said.steps, said.position, outcome)
        elif waiting.alone:
            self._replies.answer(said, outcome)
        else:
            self._replies.coalesce(said, outcome)

    def _settled_group(self, frame: Frame, rows: list[int] | None, lineup: _Lineup | None, reply: GroupReply) -> None:
        """rows: of the frame that were submitted, if not all."""
        if self._replies.closed:
            return
        if lineup is not None and reply.cohort is not None:
            lineup.cohorts.append(reply.cohort)
        self._replies.answer_group(frame, rows, reply)


def _members(
    bound: dict[int, Session], handles: list[int], faults: dict[int, UnrollError]
) -> tuple[list[int], list[Session]]:
    """The entries without fault whose handles are bound here, and their sessions."""
    members = [session for handle in handles if (session := bound.get(handle)) is not None]
    if len(members) == len(handles) and not faults:
        return list(range(len(handles))), members
    rows = [i for i, handle in enumerate(handles) if handle in bound and i not in faults]
    return rows, [bound[handles[i]] for i in rows]


def _check_here(served: ServedModel, session: Session) -> None:
    """Raises what became of the session, if it is not here any more."""
    if session.life is Life.LEAVING or session.life is Life.GONE:
        table = served.scheduler.sessions
        if session.id in table:
            raise _another(session)
        raise table.closed.error(session.id, served.loop.clock.now())


def _another(session: Session) -> SessionClosed:
    return SessionClosed(f"session {session.id!r} was closed; another of that id was opened since")


def _check_mode(wanted: _Wanted) -> None:
    if wanted.mode == "resume" and wanted.session_id is None:
        raise InvalidRequest("a session to resume needs its session_id")


def _check_depth(session: Session, position: int | None) -> None:
    """Raises QueueFull if a new chunk is one more than the session's client pipelines. A retry is not new."""
    if position is None or position == session.expected:
        chunks = sum(not isinstance(work, Action) for work in session.own_progress.queue())
        if chunks >= session.depth:
            raise QueueFull(f"{chunks} chunks of the session are unanswered; it was opened for {session.depth}", 0.0)
