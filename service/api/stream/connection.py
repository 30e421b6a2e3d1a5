"""One stream connection: it carries many sessions, and a frame has chunks of several sessions.

This package implements the protocol. It receives and answers messages through a `Link`, independent of the web server.
Only `control` awaits anything, namely the store:

    bytes -> connection -> codec -> flow.acquire -> submission -> the scheduler's loop
                                                                          |
    bytes <- link <- replies, flow.release <- submission <- outcomes <----+

`connection` connects the parts. `control` answers text messages, `handles` maps handles to sessions, `link` is the
interface to the web server, and `endpoint` is the route.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from unroll.service.api.answer_log import log_answer
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

#: Close code when the server shuts down: Service Restart in RFC 6455's registry.
RESTART = 1012
#: Maximum number of sessions per message at the end.
GOODBYES = 64


class Connection:
    """Handles the messages of a link.

    Args:
        model: `name` or `name:version`.
        link: The connection, which may not be accepted yet.

    Raises:
        ModelUnknown: There is no such model.
        NotStreamable: The model serves only whole sequences.
        Draining: The server is shutting down.
        QuotaExceeded: The tenant has reached its limit of streams.
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
        steps = JsonSteps(served.codec, self._submitter, self._flow, self._over_quota)
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
                raise BodyTooLarge(f"the frame has {len(message)} bytes; the limit is {self._max_frame_bytes}")
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
            remaining = self._submitter.submit_frame(frame, faults)
            if len(remaining) > SLICE:
                self._control.carry_out(self._submit_in_slices(frame, faults, remaining))
            else:
                self._submitter.submit_chunks(frame, faults, remaining)
        flow.update()

    async def _submit_in_slices(self, frame: Frame, faults: dict[int, UnrollError], entries: list[int]) -> None:
        for begin in range(0, len(entries), SLICE):
            self._submitter.submit_chunks(frame, faults, entries[begin : begin + SLICE])
            await asyncio.sleep(0)

    def _over_quota(self, steps: int) -> UnrollError | None:
        try:
            self._app.meter.take(self.tenant, steps)
        except UnrollError as error:
            return error
        return None

    def on_writable(self, writable: bool) -> None:
        """Called when the client stops reading, and when it reads again."""
        self._flow.writable = writable
        self._flow.update()

    def drain(self) -> None:
        """Stop reading, answer all messages that were read, send goodbyes, and close the connection."""
        self._flow.draining = True
        self._flow.update()

    def close(self) -> None:
        """Clean up after the connection ended. Its sessions stay open; work that has not started is cancelled."""
        self._app.streams.discard(self)
        self._replies.close()
        self._submitter.close()
        self._rollouts.close()
        self._control.close()
        self._flow.clear()

    def _log(self, error: UnrollError, handle: int | None, position: int | None, session_id: str | None) -> None:
        found = None if handle is None else self._handles.find(handle)
        session = session_id if found is None else shown(found[1].id)
        known = {"model": split_reference(self._model)[0], "session": session, "position": position}
        log_answer(self._app.request_log, "v1/stream", error.status, error, **known)
        wrong = type(error) is InvalidRequest or isinstance(error, BodyTooLarge)
        if wrong and self._errors.take(1 if handle is None else 1 / ENTRIES_PER_ERROR):
            self._link.close(TOO_MUCH, f"too many malformed messages: the limit is {ERRORS[0]:g} per second")

    # ── goodbyes: send the client the positions of its sessions, and close the connection ────────

    def _on_drained(self) -> None:
        self._send_goodbyes(iter([*self._handles]))

    def _send_goodbyes(self, handles: Iterator[int]) -> None:
        if self._replies.closed:
            return
        if described := [self._describe(handle) for handle in islice(handles, GOODBYES)]:
            self._replies.send({"op": "closing", "sessions": described})
            self._call_soon(partial(self._send_goodbyes, handles))
        else:
            self._link.close(RESTART, "the server is shutting down: resume elsewhere")

    def _describe(self, handle: int) -> dict[str, Any]:
        try:
            return self._handles.describe_session(handle)
        except UnrollError as error:
            return {"handle": handle, "error": error_members(error)}
