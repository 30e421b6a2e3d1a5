"""Steps in JSON, for use by hand: one chunk per text message, with the same positions and errors as frames."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from unroll.service.api.stream.flow import FlowControl
from unroll.service.api.stream.messages import StepsRequest
from unroll.service.api.stream.submission import FrameSubmitter
from unroll.service.core.errors import InvalidShape, UnrollError
from unroll.service.protocol.frames import SingleEntryFrame
from unroll.service.protocol.json import MAX_VALUES
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.reply import Reply


class JsonSteps:
    """Decodes and submits steps in JSON. over_quota: returns an error if the tenant may not run this many steps now."""

    def __init__(
        self,
        codec: Codec,
        submitter: FrameSubmitter,
        flow: FlowControl,
        over_quota: Callable[[int], UnrollError | None],
    ) -> None:
        self._codec = codec
        self._step_values = sum(math.prod(spec.shape) for spec in codec.outputs)
        self._submitter = submitter
        self._replies = submitter.replies
        self._flow = flow
        self._over_quota = over_quota

    def submit(self, request: StepsRequest) -> None:
        try:
            inputs = self._codec.from_json(request.inputs)
            if (values := len(inputs[0]) * self._step_values) > MAX_VALUES:
                raise InvalidShape(f"the answer would have {values} values; at most {MAX_VALUES} in JSON: send frames")
        except UnrollError as error:
            self._flow.acquire(1, 0)
            self._replies.refuse(request.handle, 0, request.position, error)
            return
        entry = SingleEntryFrame(request.handle, len(inputs[0]), request.position, inputs)
        self._flow.acquire(1, entry.steps)
        answer = partial(self._answer, batch_rows=request.batch_rows)
        self._submitter.submit(entry, self._over_quota(entry.steps), answer)
        self._flow.update()

    def _answer(self, entry: SingleEntryFrame, reply: Reply, *, batch_rows: bool) -> None:
        """batch_rows: tell the size of the chunk's batch; null for a remembered reply."""
        document: dict[str, Any] = {"op": "outputs", "handle": entry.handle, "position": reply.position}
        document |= {"outputs": self._codec.to_json(reply.outputs), "reply_kept": reply.kept}
        if batch_rows:
            found = self._submitter.handles.find(entry.handle)
            document["batch_rows"] = None if found is None else found[0].scheduler.answered_rows or None
        self._replies.answer_text(entry, document)
