"""Control messages: requests to open and close sessions, to detach handles, and to start and stop rollouts."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import structlog

from unroll.service.api.session_operations import durability_of
from unroll.service.api.stream.allowance import CONTROLS, Allowance
from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.handles import Handles
from unroll.service.api.stream.json_steps import JsonSteps
from unroll.service.api.stream.messages import (
    OpenRequest,
    OpenSpec,
    RolloutRequest,
    StepsRequest,
    StopRequest,
    parse_request,
)
from unroll.service.api.stream.replies import Replies, error_members
from unroll.service.api.stream.rollouts import StreamRollouts
from unroll.service.core.errors import EngineFailed, InvalidRequest, UnrollError
from unroll.service.core.session_ids import shown
from unroll.service.core.turns import LONG_BYTES, Turns
from unroll.service.protocol import json

_log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Sessions, or chunks of a frame, handled per turn of the event loop.
SLICE = 16
#: The same for detached handles, which cost almost nothing.
_DETACH_SLICE = 4096
#: Sessions requested from the store at once.
_STORE_SLICE = 256
#: Minimum pause in reading from a client that sends too many control messages, in seconds.
_LEAST_PAUSE = 0.02


class Control:
    """Runs control requests one at a time, one slice per turn of the event loop.

    While a request is running, later messages wait in the backlog, in order.

    Attributes:
        running: A request is running; later messages must be deferred.
    """

    def __init__(
        self,
        handles: Handles,
        work: tuple[JsonSteps, StreamRollouts],
        replies: Replies,
        flow: FlowControl,
        turns: Turns,
        max_bytes: int,
    ) -> None:
        self._handles = handles
        self._steps, self._rollouts = work
        self._replies = replies
        self._flow = flow
        self._turns = turns
        self._max_bytes = max_bytes
        self._allowance = Allowance(*CONTROLS)
        self._backlog: deque[tuple[Callable[[bytes], None], bytes]] = deque()
        self.running = False
        self._task: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None  # the same task, if it may be cancelled on close

    def defer(self, handle: Callable[[bytes], None], message: bytes) -> None:
        """Call `handle` with the message after the running request and the backlog."""
        self._backlog.append((handle, message))
        self._flow.backlogged = True
        self._flow.update()

    def start(self, message: bytes) -> None:
        """Start a request. Without a store, a request for fewer than `SLICE` sessions is answered before this returns.

        Raises:
            InvalidRequest: Nothing was done.
        """
        json.check_size(message, self._max_bytes)
        request = parse_request(message)
        if isinstance(request, StepsRequest):
            if len(message) > LONG_BYTES:
                self.carry_out(self._submit_steps(request))
            else:
                self._steps.submit(request)
            return
        if seconds := self._allowance.take():
            self._throttle(seconds)
        if isinstance(request, OpenRequest):
            self._run("opened", request.sessions, self._open)
        elif isinstance(request, RolloutRequest):
            self.carry_out(self._rollouts.begin(request), as_task=True)  # until its initial state is known
        elif isinstance(request, StopRequest):
            self._rollouts.stop(request.handle)
            self._replies.send({"op": "stopped", "handle": request.handle})
        elif request.op == "close":
            self._run("closed", request.handles, self._close)
        else:
            self._detach(request.handles)

    def _throttle(self, seconds: float) -> None:
        """Pause reading until the client's next message is within the limit."""

        def resume() -> None:
            self._flow.throttled = False
            self._flow.update()

        self._flow.throttled = True
        self._flow.update()
        asyncio.get_running_loop().call_later(max(seconds, _LEAST_PAUSE), resume)

    def close(self) -> None:
        """Clean up after the connection ended: cancel the opening of sessions, but complete their closing."""
        self._backlog.clear()
        if self._opening is not None:
            self._opening.cancel()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    async def _open(self, spec: OpenSpec) -> dict[str, Any]:
        try:
            served, session = await self._handles.open(spec)
        except UnrollError as error:
            self._replies.on_refused(error, None, None, spec.session_id)
            return {"handle": spec.handle, "error": error_members(error)}
        return {
            "handle": spec.handle,
            "session_id": shown(session.id),
            "position": session.position,
            "model_version": served.version,
            "durability": durability_of(session),
        }

    async def _close(self, handle: int) -> dict[str, Any]:
        self._rollouts.stop(handle)
        try:
            position = await self._handles.close(handle)
        except UnrollError as error:
            self._replies.on_refused(error, handle, None, None)
            return {"handle": handle, "error": error_members(error)}
        return {"handle": handle, "position": position}

    async def _submit_steps(self, request: StepsRequest) -> None:
        await asyncio.sleep(0)  # parsing took one turn; decode the values in another
        self._steps.submit(request)

    def _detach(self, handles: list[int]) -> None:
        if unknown := self._handles.unbound(handles):
            first = next(handle for handle in handles if handle in unknown)
            raise InvalidRequest(f"no session is bound to handle {first}", handle=first)
        self.carry_out(self._detach_in_slices(handles))

    async def _detach_in_slices(self, handles: list[int]) -> None:
        for begin in range(0, len(handles), _DETACH_SLICE):
            if begin:
                await asyncio.sleep(0)
            for handle in handles[begin : begin + _DETACH_SLICE]:
                self._rollouts.stop(handle)
                self._handles.unbind(handle)
        self._replies.send({"op": "detached", "handles": handles})

    # ── slices ───────────────────────────────────────────────────────────────────────────────────

    def _run(self, op: str, items: Sequence[T], handle: Callable[[T], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        self.carry_out(self._in_slices(op, items, handle), as_task=self._handles.has_store)
        self._opening = self._task if op == "opened" else None

    def carry_out(self, slices: Coroutine[Any, Any, None], *, as_task: bool = False) -> None:
        """Run a coroutine; later messages wait for it.

        as_task: it may wait for the store. Otherwise it suspends only after each slice.
        """
        self.running = True
        if as_task:
            self._task = asyncio.ensure_future(self._complete(slices))
        else:
            self._advance(slices)
        if self.running:
            self._flow.busy = True
            self._flow.update()

    async def _in_slices(
        self, op: str, items: Sequence[T], handle: Callable[[T], Coroutine[Any, Any, dict[str, Any]]]
    ) -> None:
        """Handle all items and send the results. Without a store, this suspends only after full slices."""
        parts: list[bytes] = []
        size = _STORE_SLICE if self._handles.has_store else SLICE
        for begin in range(0, len(items), size):
            part = items[begin : begin + size]
            if self._handles.has_store:
                results = await asyncio.gather(*map(handle, part))
            else:
                results = [await handle(item) for item in part]
            parts.append(json.dump(results)[1:-1])
            if len(part) == size:
                await asyncio.sleep(0)
        if not self._replies.closed:
            self._replies.send_text(b'{"op":"%b","sessions":[%b]}' % (op.encode(), b",".join(parts)))

    async def _complete(self, slices: Coroutine[Any, Any, None]) -> None:
        try:
            await slices
        except Exception as error:  # noqa: BLE001 the client waits for an answer, and later messages for this one
            _log.error("unexpected error", exc_info=error)
            if not self._replies.closed:
                self._replies.send_error(EngineFailed("the server failed on this request; its log has the reason"))
        self.running, self._task, self._opening = False, None, None
        self._drain_backlog()

    def _advance(self, slices: Coroutine[Any, Any, None]) -> None:
        """Run one slice, and schedule the next for a later turn of the event loop."""
        try:
            slices.send(None)
        except StopIteration:
            self.running = False
            return
        self._turns.call(partial(self._resume, slices))

    def _resume(self, slices: Coroutine[Any, Any, None]) -> None:
        if self._replies.closed:
            slices.close()
            return
        self._advance(slices)
        self._drain_backlog()

    def _drain_backlog(self) -> None:
        """Handle deferred messages, up to the next request that takes longer than a slice."""
        if self._replies.closed:
            return
        while self._backlog and not self.running:
            handle, message = self._backlog.popleft()
            handle(message)
        self._flow.busy, self._flow.backlogged = self.running, bool(self._backlog)
        self._flow.update()
