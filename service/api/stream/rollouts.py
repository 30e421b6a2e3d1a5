"""The rollouts of one connection, at most one per handle at a time."""

from unroll.service.api.app_state import AppState
from unroll.service.api.rollout import RolloutCall, step_members
from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.handles import Handles
from unroll.service.api.stream.messages import RolloutRequest
from unroll.service.api.stream.replies import Replies
from unroll.service.core.errors import InvalidRequest, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.protocol.frames import encode_rolled
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.closed_sessions import replaced
from unroll.service.scheduler.session import Session


class StreamRollouts:
    """Starts and stops rollouts, and sends their results. flow: each rollout counts as one entry."""

    def __init__(self, app: AppState, name: str, handles: Handles, replies: Replies, flow: FlowControl) -> None:
        self._app = app
        self._name = name
        self._handles = handles
        self.replies = replies
        self.flow = flow
        self.running: dict[int, RolloutCall] = {}

    async def begin(self, request: RolloutRequest) -> None:
        """Start a rollout, which answers in separate messages. Suspends until its initial state is known."""
        handle = request.handle
        found = self._handles.find(handle)
        self.flow.acquire(1, 0)
        if found is None or handle in self.running:
            why = (
                f"no session is bound to handle {handle}" if found is None else f"handle {handle} has a rollout already"
            )
            self.replies.refuse(handle, 0, request.position, InvalidRequest(why), rollout=True)
            return
        sink, timeout = _Sink(self, request, found[1]), self._app.limits.request_timeout
        call = RolloutCall(self._app, self._name, None, found[1].id, request, timeout, sink)
        self.running[handle] = call
        await call.begin()

    def stop(self, handle: int) -> None:
        """Stop the handle's rollout, if there is one; no more steps are sent."""
        if (call := self.running.pop(handle, None)) is not None:
            call.cancel()
            self.flow.release(1, 0)

    def close(self) -> None:
        for call in self.running.values():
            call.cancel()
        self.running.clear()


class _Sink:
    """Sends the results of one rollout. bound: the session that its handle is bound to."""

    def __init__(self, rollouts: StreamRollouts, request: RolloutRequest, bound: Session) -> None:
        self._rollouts = rollouts
        self._replies = rollouts.replies
        self._request = request
        self._bound = bound

    def check(self, session: Session) -> None:
        bound = self._bound
        if session is not bound and (bound.origin is None or session.origin != bound.origin):
            raise replaced(bound.id)

    def on_steps(self, codec: Codec, position: int, inputs: Tensors, outputs: Tensors) -> None:
        request = self._request
        if request.values == "json":
            members = step_members(codec, request.send, position, inputs, outputs)
            self._replies.send({"op": "rolling", "handle": request.handle, **members})
            return
        tensors = {"inputs": inputs, "outputs": outputs, "both": (*inputs, *outputs)}[request.send]
        self._replies.send_frame(encode_rolled(request.handle, len(inputs[0]), position, tensors))

    def on_end(self, position: int, kept: bool) -> None:
        handle = self._request.handle
        del self._rollouts.running[handle]
        self._replies.send({"op": "rolled", "handle": handle, "position": position, "reply_kept": kept})
        self._rollouts.flow.release(1, 0)

    def on_error(self, error: UnrollError) -> None:
        handle = self._request.handle
        del self._rollouts.running[handle]
        self._replies.refuse(handle, 0, self._request.position, error, rollout=True)
