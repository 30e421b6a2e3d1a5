"""Rollouts, from the request to the outputs of each step, for both HTTP and streams.

A rollout on a fork runs on a private copy of the session's state. A rollout on the session is a chunk: it is applied
once, as a whole, at its end, and a retry gets the same outputs.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import structlog
from pydantic import Base64Bytes, Field

from unroll.bundle import TensorSpec
from unroll.service.api.app_state import AppState
from unroll.service.api.bodies import Strict
from unroll.service.api.feedback import Feedback, FeedbackSpec
from unroll.service.api.parameters import require_streamable
from unroll.service.api.sealed_steps import keys_of
from unroll.service.core.errors import (
    EngineFailed,
    InvalidRequest,
    InvalidShape,
    PositionGap,
    PositionTooOld,
    SessionContended,
    UnrollError,
)
from unroll.service.core.session_ids import tenant_of
from unroll.service.core.turns import SLICE_SECONDS
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol.tensors import Codec, numbers
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.rollout import Piece, Rollout
from unroll.service.scheduler.session import Session
from unroll.service.sessions.attempts import Attempts
from unroll.service.state.snapshot import Snapshot

_log = structlog.get_logger(__name__)

#: Which tensors to send per step: the inputs that the map computed, the outputs, or both.
Send = Literal["both", "inputs", "outputs"]
#: Maximum number of values per event, which is encoded in one turn of the event loop. A single step may exceed it.
_EVENT_VALUES = 8192


class RolloutSpec(Strict):
    """The parameters of a rollout, for HTTP and streams."""

    steps: int = Field(ge=1, description="number of time steps whose inputs are computed from previous outputs")
    map: FeedbackSpec = Field(description="how to compute them; {input: map} for a model with several inputs")
    on: Literal["fork", "session"] = Field(
        "fork",
        description="fork: on a copy, so that the session does not change; session: on the session, as one chunk",
    )
    inputs: list[Any] | dict[str, list[Any]] | None = Field(
        None, description="[step, ...], as for steps: time steps to run before those that are fed back"
    )
    outputs: Any = Field(
        None,
        description="without inputs: the outputs of the session's last time step, to compute the first inputs from; "
        "optional on a fork if the server has kept them",
    )
    position: int | None = Field(None, ge=0, lt=2**63, description="the session's position as the client expects it")
    steps_per_event: int = Field(1, ge=1, description="time steps to send together")
    send: Send = "both"


class RolloutRequest(RolloutSpec):
    snapshot: Base64Bytes | None = Field(
        None, description="with durability client: the latest snapshot of the session, Base64"
    )


class Sink(Protocol):
    """Receives the results of a rollout from the scheduler. Only `check` may raise."""

    def check(self, session: Session) -> None:
        """Raises UnrollError if this is not the session that the client meant."""

    def on_steps(self, codec: Codec, position: int, inputs: Tensors, outputs: Tensors) -> None:
        """Called with completed time steps, in the form of a chunk. position: after these steps."""

    def on_end(self, position: int, kept: bool) -> None:
        """Called after the last step. kept: as in `Reply`."""

    def on_error(self, error: UnrollError) -> None: ...


class RolloutCall:
    """One rollout, from its request to its end.

    Args:
        timeout: Seconds within which it must start.
        sink: Receives the outputs, then the end or an error.
    """

    def __init__(
        self,
        app: AppState,
        name: str,
        version: str | None,
        session_id: str,
        wanted: RolloutSpec,
        timeout: float,
        sink: Sink,
    ) -> None:
        self._app = app
        self._where = name, version, session_id
        self._wanted = wanted
        self._timeout = timeout
        self._sink = sink
        self._attempts = Attempts(app.sessions, name, self._begin_on_session, self._fail)
        self._served: ServedModel | None = None
        self._running: Rollout | None = None  # for a retry, the rollout of the first request
        self._pieces: Iterator[Piece | None] = iter(())
        self._waiting: list[Piece] = []  # steps to be sent together
        self._together = wanted.steps_per_event  # maximum number of such steps
        self._steps_waiting = self._sent = self._start = 0
        self._outcome: Outcome | None = None
        self._has_turn = False  # a later turn of the event loop will send more
        self._over = False

    async def begin(self) -> None:
        """Start the rollout. Errors go to the sink."""
        try:
            self._check()
            if self._wanted.on == "session":
                self._attempts.run()
            else:
                await self._begin_on_fork()
        except UnrollError as error:
            self._fail(error)

    def cancel(self) -> None:
        """Stop the rollout within one step. The session stays unchanged."""
        self._over = True
        if self._running is not None and self._served is not None:
            if self._wake in self._running.followers:
                self._running.followers.remove(self._wake)
            self._served.loop.leave(self._running, self._on_outcome)

    # ── start ────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        wanted, most = self._wanted, self._app.limits.max_rollout_steps
        if wanted.steps > most:
            raise InvalidShape(f"{wanted.steps} steps in one rollout; at most {most} are allowed (--max-rollout-steps)")
        if wanted.inputs is not None and wanted.outputs is not None:
            raise InvalidRequest("a rollout starts from 'inputs' or from 'outputs', not from both")
        if wanted.on == "session" and wanted.inputs is None and wanted.outputs is None:
            raise InvalidRequest(
                "a rollout on the session needs 'inputs', or the 'outputs' of its last step, so that retries are equal"
            )

    async def _begin_on_fork(self) -> None:
        self._app.refuse_if_draining()
        served, snapshot, last = await self._copied()
        require_streamable(served)
        _check_position(self._wanted.position, snapshot.position)
        rollout = self._rollout_of(served, snapshot.position, last, state_row=snapshot.row)
        if not self._over:
            self._submit(served, rollout)

    async def _copied(self) -> tuple[ServedModel, Snapshot, Tensors | None]:
        name, version, session_id = self._where
        sealed = self._wanted.snapshot if isinstance(self._wanted, RolloutRequest) else None
        if sealed is None:
            return await self._app.sessions.copy(name, version, session_id, self._sink.check)
        content = keys_of(self._app).open(session_id, sealed)
        served = self._app.models.of_snapshot(name, version, Snapshot.model_of(content))
        return served, served.read_snapshot(content), None

    def _begin_on_session(self) -> None:
        """Raises NeedsStoreLookup. Other errors go to the sink."""
        if self._over:
            return
        self._running = self._outcome = None
        try:
            served, session = self._app.sessions.owner(*self._where)
            require_streamable(served)
            if any(not spec.time for spec in served.manifest.outputs):
                raise InvalidRequest(
                    "an output has no time axis, so a retry could not be answered: roll out on a fork, and then send "
                    "the steps to keep"
                )
            if session is None:
                raise served.ended(self._where[2])
            self._sink.check(session)
            position = session.expected if self._wanted.position is None else self._wanted.position
            self._submit(served, self._rollout_of(served, position, None, session=session))
        except UnrollError as error:
            self._fail(error)

    def _rollout_of(self, served: ServedModel, position: int, last: Tensors | None, **where: Any) -> Rollout:
        wanted, codec = self._wanted, served.codec
        if wanted.steps_per_event > 1 and not all(spec.time for spec in served.manifest.outputs):
            raise InvalidRequest("an output has no time axis, so 'steps_per_event' must be 1")
        given = () if wanted.inputs is None else codec.from_json(wanted.inputs)
        begin = position + (len(given[0]) if given else 0)
        feed = Feedback(wanted.map, codec, served.manifest, wanted.steps, begin)
        if wanted.outputs is not None:
            last = _outputs_of(codec, wanted.outputs)
        if not given and last is None:
            raise InvalidRequest(
                "the server has not kept the outputs of the session's last step: send them as 'outputs', or the next "
                "time step as 'inputs'"
            )
        first = given or feed(last or (), position)
        length = wanted.steps + (len(given[0]) if given else 0)
        digest = _digest(wanted, length, given or last or ())
        return Rollout(digest, first, length, feed, position, **where)

    def _submit(self, served: ServedModel, rollout: Rollout) -> None:
        served.scheduler.rollouts.check_room()
        self._app.meter.take(tenant_of(self._where[2]), rollout.length)
        rollout.tenant = tenant_of(self._where[2])
        self._served, self._start = served, rollout.start
        values = sum(spec.size for spec in (*served.manifest.inputs, *served.manifest.outputs))
        most = max(1, _EVENT_VALUES // values)
        self._together = min(self._wanted.steps_per_event, most)
        self._pieces = self._pieces_again(rollout, most)
        accepted = served.loop.submit(rollout, self._timeout, self._on_outcome)
        if accepted is rollout:
            served.scheduler.rollouts.add(rollout)
        elif not isinstance(accepted, Rollout):
            return  # a retry: the remembered reply has been sent
        self._running = accepted
        self._pieces = self._pieces_of(accepted)
        accepted.followers.append(self._wake)
        self._advance()

    # ── results ──────────────────────────────────────────────────────────────────────────────────

    def _pieces_of(self, running: Rollout) -> Iterator[Piece | None]:
        """All pieces in order; yields None while the next has not run."""
        assert self._served is not None
        sent = 0
        while self._outcome is None or sent < len(running.ran):
            if sent < len(running.ran):
                yield running.ran[sent]
                sent += 1
            else:
                yield None
        if isinstance(reply := self._outcome, Reply):
            steps = len(running.begun[0])
            columns = zip(self._served.manifest.outputs, reply.outputs, strict=True)
            yield running.begun, tuple([array[-steps:] if spec.time else array for spec, array in columns])

    def _pieces_again(self, rollout: Rollout, most: int) -> Iterator[Piece]:
        """The pieces of a rollout that was already applied: recompute its inputs from its outputs.

        most: maximum number of steps per piece.
        """
        assert isinstance(self._outcome, Reply)
        done, given = 0, len(rollout.given[0])
        outputs: Tensors = ()
        while done < rollout.length:
            part = slice(done, min(done + most, given) if done < given else done + 1)
            inputs = tuple([array[part] for array in rollout.given])
            if done >= given:
                inputs = rollout.feed(outputs, rollout.start + done)
            outputs = tuple([array[part] for array in self._outcome.outputs])
            yield inputs, outputs
            done = part.stop

    def _on_outcome(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._wake()

    def _wake(self) -> None:
        if not self._has_turn:
            self._advance()

    def _advance(self) -> None:
        """Send the available pieces, over several turns of the event loop if necessary, and finally the end."""
        self._has_turn = False
        if self._over:
            return
        until = perf_counter() + SLICE_SECONDS
        for piece in self._pieces:
            if piece is None:
                return
            self._on_piece(*piece)
            if self._over:  # encoding failed
                return
            if perf_counter() > until:
                self._has_turn = True
                self._app.turns.call(self._advance)
                return
        self._end()

    def _on_piece(self, inputs: Tensors, outputs: Tensors) -> None:
        self._waiting.append((inputs, outputs))
        self._steps_waiting += len(inputs[0])
        if self._steps_waiting >= self._together:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        assert self._served is not None
        columns = [zip(*tensors, strict=True) for tensors in zip(*self._waiting, strict=True)]
        self._waiting, self._steps_waiting = [], 0
        inputs, outputs = [
            tuple([parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in column]) for column in columns
        ]
        self._sent += len(inputs[0])
        try:
            self._sink.on_steps(self._served.codec, self._start + self._sent, inputs, outputs)
        except Exception as error:  # noqa: BLE001 the loop that calls this serves all clients
            _log.error("rollout not encoded", exc_info=error)
            self._fail(EngineFailed("the outputs could not be encoded; the server's log has the reason"))
            asyncio.get_running_loop().call_soon(self.cancel)

    def _end(self) -> None:
        outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, UnrollError):
            is_new = not (self._sent or self._waiting)
            if not (is_new and isinstance(outcome, SessionContended) and self._attempts.again()):
                self._fail(outcome)
            return
        self._flush()
        if not self._over:  # encoding did not fail
            self._over = True
            self._sink.on_end(outcome.position, outcome.kept)

    def _fail(self, error: UnrollError) -> None:
        if not self._over:
            self._flush()
            self._over = True
            self._sink.on_error(error)


def step_members(codec: Codec, send: Send, position: int, inputs: Tensors, outputs: Tensors) -> dict[str, Any]:
    members: dict[str, Any] = {"position": position}
    if send != "outputs":
        members["inputs"] = codec.inputs_to_json(inputs)
    if send != "inputs":
        members["outputs"] = codec.to_json(outputs)
    return members


def _check_position(wanted: int | None, position: int) -> None:
    if wanted is not None and wanted != position:
        kind = PositionGap if wanted > position else PositionTooOld
        raise kind(f"the session is at {position}, the rollout begins at {wanted}", expected=position)


def _outputs_of(codec: Codec, value: Any) -> Tensors:
    """Parse one time step of each output, in the form of a chunk of one step. Raises InvalidRequest."""
    specs = codec.outputs
    values = value if isinstance(value, dict) else {specs[0].name: value}
    if values.keys() != {spec.name for spec in specs} or (len(specs) > 1 and not isinstance(value, dict)):
        raise InvalidShape(f"'outputs' must have one time step of each output: {[spec.name for spec in specs]}")
    arrays = []
    for spec in specs:
        array = numbers(TensorSpec(spec.name, spec.dtype, spec.shape, True), [values[spec.name]])
        if array.shape != (1, *spec.shape):
            raise InvalidShape(f"{spec.name!r} in 'outputs' must have the shape {spec.shape}, not {array.shape[1:]}")
        arrays.append(array if spec.time else array[0])
    return tuple(arrays)


def _digest(wanted: RolloutSpec, length: int, begin: Tensors) -> np.ndarray:
    """Identifies a rollout on a session independent of the request's encoding, (16,) uint8.

    length: total number of time steps. begin: the given inputs, or the outputs to start from.
    """
    asked = wanted.model_dump_json(include={"steps", "map"}, by_alias=True)
    digest = hashlib.blake2b(f"{length} {asked}".encode(), digest_size=16)
    for array in begin:
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
