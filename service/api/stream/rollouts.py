"""The rollouts of one connection: at most one at a time for each handle."""

from typing import Any

from unroll.service.api.app_state import AppState
from unroll.service.api.rollout import RolloutCall, step_members
from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.handles import Handles, replaced
from unroll.service.api.stream.messages import RolloutRequest
from unroll.service.api.stream.replies import Replies
from unroll.service.core.errors import InvalidRequest, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.protocol.frames import encode_rolled
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.session import Session


class StreamRollouts:
    """Begins and stops rollouts, and sends what they bring.

    Args:
        flow: where each rollout counts as an entry.
    """

    def __init__(self, app: AppState, name: str, handles: Handles, replies: Replies, flow: FlowControl) -> None:
        self._app = app
        self._name = name
        self._handles = handles
        self._replies = replies
        self._flow = flow
        self._running: dict[int, RolloutCall] = {}

    async def begin(self, request: RolloutRequest) -> None:
        """Begin; every answer is a message of its own. Suspends until the state to begin from is known."""
        handle = request.handle
        found = self._handles.find(handle)
        self._flow.acquire(1, 0)
        if found is None or handle in self._running:
            why = (
                f"no session is bound to handle {handle}" if found is None else f"handle {handle} is rolled out already"
            )
            self._replies.refuse(handle, 0, request.position, InvalidRequest(why), rollout=True)
            return
        sink, timeout = _Sink(self, request, found[1]), self._app.limits.request_timeout
        call = RolloutCall(self._app, self._name, None, found[1].id, request, timeout, sink)
        self._running[handle] = call
        await call.begin()

    def stop(self, handle: int) -> None:
        """Stop the rollout of the handle, if there is one. No more of its steps are sent."""
        if (call := self._running.pop(handle, None)) is not None:
            call.cancel()
            self._flow.release(1, 0)

    def close(self) -> None:
        for call in self._running.values():
            call.cancel()
        self._running.clear()

    def send_steps(
        self, request: RolloutRequest, codec: Codec, position: int, inputs: Tensors, outputs: Tensors
    ) -> None:
        if request.values == "json":
            members = step_members(codec, request.send, position, inputs, outputs)
            self._replies.send({"op": "rolling", "handle": request.handle, **members})
            return
        tensors = {"inputs": inputs, "outputs": outputs, "both": (*inputs, *outputs)}[request.send]
        self._replies.send_frame(encode_rolled(request.handle, len(inputs[0]), position, tensors))

    def end(self, request: RolloutRequest, members: dict[str, Any]) -> None:
        del self._running[request.handle]
        self._replies.send({"op": "rolled", "handle": request.handle, **members})
        self._flow.release(1, 0)

    def fail(self, request: RolloutRequest, error: UnrollError) -> None:
        del self._running[request.handle]
        self._replies.refuse(request.handle, 0, request.position, error, rollout=True)


class _Sink:
    """Of one rollout. bound: the session that its handle means."""

    def __init__(self, rollouts: StreamRollouts, request: RolloutRequest, bound: Session) -> None:
        self._rollouts = rollouts
        self._request = request
        self._bound = bound

    def check(self, session: Session) -> None:
        bound = self._bound
        if session is not bound and (bound.origin is None or session.origin != bound.origin):
            raise replaced(bound)

    def on_steps(self, codec: Codec, position: int, inputs: Tensors, outputs: Tensors) -> None:
        self._rollouts.send_steps(self._request, codec, position, inputs, outputs)

    def on_end(self, position: int, kept: bool) -> None:
        self._rollouts.end(self._request, {"position": position, "reply_kept": kept})

    def on_error(self, error: UnrollError) -> None:
        self._rollouts.fail(self._request, error)
