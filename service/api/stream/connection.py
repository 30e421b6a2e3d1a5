"""One connection of a stream: many sessions, and chunks of many of them in one frame.

This package is the protocol. It gets messages and answers them through a `Link`, and knows no web server. Only
`control` waits, for the store:

    bytes -> connection -> codec -> flow.acquire -> submission -> the scheduler's loop
                                                                          |
    bytes <- link <- replies, flow.release <- submission <- outcomes <----+

`connection` only connects the parts. `control` answers text messages, `handles` knows the sessions, `link` is how a web
server offers a connection, and `endpoint` is the route.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from unroll.service.api.answer_log import log_error
from unroll.service.api.app_state import AppState
from unroll.service.api.parameters import require_streamable, split_reference
from unroll.service.api.stream.allowance import ENTRIES_PER_ERROR, ERRORS, TOO_MUCH, Allowance
from unroll.service.api.stream.control import SLICE, Control
from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.handles import Handles
from unroll.service.api.stream.json_steps import JsonSteps
from unroll.service.api.stream.link import Link
from unroll.service.api.stream.replies import CallSoon, Replies, error_members
from unroll.service.api.stream.rollouts import StreamRollouts
from unroll.service.api.stream.submission import FrameSubmitter, RecurringFrames
from unroll.service.core import failpoints
from unroll.service.core.errors import BodyTooLarge, InvalidRequest, UnrollError
from unroll.service.core.session_ids import shown
from unroll.service.protocol.frames import Frame, FrameCodec, SingleEntryFrame

#: Close code of a stream whose server ends: RFC 6455's registry calls it Service Restart.
RESTART = 1012


class Connection:
    """Gets what the link receives.

    Args:
        model: the model's, `name` or `name:version`.
        link: the connection, which need not be accepted yet.

    Raises:
        ModelUnknown: there is no such model.
        NotStreamable: it serves whole sequences only.
        Draining: the server is about to end.
        QuotaExceeded: the tenant has as many streams as it may.
    """

    def __init__(self, app: AppState, tenant: str, model: str, link: Link, call_soon: CallSoon) -> None:
        app.refuse_if_draining()
        app.refuse_another_stream(tenant)
        name, version = split_reference(model)
        served = app.models.resolve(name, version)
        require_streamable(served)
        self.tenant = tenant
        self._app = app
        self._model = model
        self._link = link
        self._call_soon = call_soon
        self._errors = Allowance(*ERRORS)
        self._max_frame_bytes = app.limits.max_body_bytes
        self._codec = FrameCodec(served.manifest.inputs, served.codec.max_steps)
        step_bytes = sum(spec.nbytes for spec in (*served.manifest.inputs, *served.manifest.outputs))
        self._flow = FlowControl(step_bytes, link.pause, link.resume, self._on_drained)
        self._replies = Replies(link, self._flow, call_soon, self._log)
        recurring = RecurringFrames()
        self._handles = Handles(app, tenant, model, served, recurring.clear)
        self._submitter = FrameSubmitter(app, name, self._handles, recurring, self._replies)
        self._rollouts = StreamRollouts(app, name, self._handles, self._replies, self._flow)
        steps = JsonSteps(served.codec, self._handles, self._submitter, self._replies, self._flow, self._over_quota)
        self._control = Control(
            *(self._handles, (steps, self._rollouts), self._replies, self._flow),
            app.turns,
            app.limits.max_json_bytes,
        )
        app.streams.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._replies.closed else self._flow.state
        return (
            f"<Connection {self._model} {state}, {len(self._handles)} sessions, "
            f"{self._flow.entries} entries unanswered>"
        )

    def on_text(self, message: bytes) -> None:
        if self._flow.drained:
            return
        if self._control.running:
            self._control.defer(self.on_text, message)
            return
        try:
            self._control.start(message)
        except InvalidRequest as error:
            self._replies.send_error(error)

    def on_binary(self, message: bytes) -> None:
        if self._flow.drained:
            return
        if self._control.running:
            self._control.defer(self.on_binary, message)
            return
        failpoints.reach("recv")
        codec, flow = self._codec, self._flow
        if len(message) == codec.step_frame_bytes and not (self.tenant and self._app.meter.limits(self.tenant)):
            step = codec.split_step(message)
            if step is not None and self._submitter.join(*step):
                flow.acquire(1, 1)
                flow.update()
                return
        try:
            if len(message) > self._max_frame_bytes:
                raise BodyTooLarge(f"a frame may have {self._max_frame_bytes} bytes, this one has {len(message)}")
            frame = codec.decode_single(message) or codec.decode(message)
        except InvalidRequest as error:
            self._replies.send_error(error)
            return
        if isinstance(frame, SingleEntryFrame):
            flow.acquire(1, frame.steps)
            self._submitter.submit(frame, codec.fault(frame.inputs) or self._over_quota(frame.steps))
        else:
            flow.acquire(len(frame.entries), frame.total)
            faults = codec.faults(frame)
            if (refused := self._over_quota(frame.total)) is not None:
                faults = dict.fromkeys(range(len(frame.entries)), refused) | faults
            apart = self._submitter.submit_frame(frame, faults)
            if len(apart) > SLICE:
                self._control.carry_out(self._submit_in_slices(frame, faults, apart))
            else:
                self._submitter.submit_apart(frame, faults, apart)
        flow.update()

    async def _submit_in_slices(self, frame: Frame, faults: dict[int, UnrollError], entries: list[int]) -> None:
        """Suspends after each slice."""
        for begin in range(0, len(entries), SLICE):
            self._submitter.submit_apart(frame, faults, entries[begin : begin + SLICE])
            await asyncio.sleep(0)

    def _over_quota(self, steps: int) -> UnrollError | None:
        try:
            self._app.meter.take(self.tenant, steps)
        except UnrollError as error:
            return error
        return None

    def on_writable(self, writable: bool) -> None:
        """The client reads again, or what it does not read piles up."""
        self._flow.writable = writable
        self._flow.update()

    def drain(self) -> None:
        """Read no more, answer what was read, tell the client where its sessions are, and close the connection."""
        self._flow.draining = True
        self._flow.update()

    def close(self) -> None:
        """The connection is gone; its sessions live on. What has not begun to run is cancelled."""
        self._app.streams.discard(self)
        self._replies.close()
        self._submitter.close()
        self._rollouts.close()
        self._control.close()
        self._flow.clear()

    def _log(self, error: UnrollError, handle: int | None, position: int | None, session_id: str | None) -> None:
        """An entry or a session of a message, or the whole message, was refused."""
        found = None if handle is None else self._handles.find(handle)
        session = session_id if found is None else shown(found[1].id)
        name = split_reference(self._model)[0]
        log_error(self._app.request_log, "v1/stream", error, model=name, session=session, position=position)
        wrong = type(error) is InvalidRequest or isinstance(error, BodyTooLarge)
        if wrong and self._errors.take(1 if handle is None else 1 / ENTRIES_PER_ERROR):
            self._link.close(TOO_MUCH, f"too many malformed messages: {ERRORS[0]:g} a second are allowed")

    # ── goodbyes: tell the client where its sessions are, and close the connection ───────────────

    def _on_drained(self) -> None:
        self._send_goodbyes(iter([*self._handles]))

    def _send_goodbyes(self, handles: Iterator[int]) -> None:
        """Describe some of the sessions now, and more in the next turn of the event loop."""
        if self._replies.closed:
            return
        if described := [self._describe(handle) for handle in islice(handles, SLICE)]:
            self._replies.send({"op": "closing", "sessions": described})
            self._call_soon(partial(self._send_goodbyes, handles))
        else:
            self._link.close(RESTART, "the server is about to end: resume elsewhere")

    def _describe(self, handle: int) -> dict[str, Any]:
        try:
            return self._handles.describe_session(handle)
        except UnrollError as error:
            return {"handle": handle, "error": error_members(error)}
