"""Submits frames to the scheduler, as cohorts, a group, joined steps or chunks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from unroll.service.api.app_state import AppState
from unroll.service.api.stream.handles import Handles, check_present
from unroll.service.api.stream.replies import Replies
from unroll.service.core.errors import NeedsStoreLookup, QueueFull, SessionContended, UnrollError
from unroll.service.engine.engine import Tensors
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol.frames import NO_POSITION, Frame, SingleEntryFrame
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import Action, Chunk, GroupReply
from unroll.service.scheduler.reply import Outcome, Reply
from unroll.service.scheduler.session import Cohort, Life, Session
from unroll.service.sessions.attempts import Attempts

#: Number of frame signatures that a connection remembers.
MAX_RECURRING = 16


@dataclass(slots=True, eq=False)
class RecurringFrame:
    """The sessions of a frame that is expected to recur.

    Attributes:
        served: The version of all its sessions; None if they differ.
        cohorts: Their cohorts, in the frame's order.
    """

    served: ServedModel | None = None
    cohorts: list[Cohort] = field(default_factory=list)


class RecurringFrames:
    """A connection's recurring frames by signature, valid until a handle changes its meaning.

    Attributes:
        steps: Recurring frames of one step, by handle.
    """

    def __init__(self) -> None:
        self._by_signature: dict[bytes, RecurringFrame] = {}
        self.steps: dict[int, RecurringStep] = {}

    def recognise(self, frame: Frame) -> RecurringFrame:
        signature = frame.signature
        recurring = self._by_signature.get(signature)
        if recurring is None:
            if len(self._by_signature) == MAX_RECURRING:
                del self._by_signature[next(iter(self._by_signature))]
            recurring = self._by_signature[signature] = RecurringFrame()
        return recurring

    def clear(self) -> None:
        self._by_signature.clear()
        self.steps.clear()


@dataclass(slots=True, eq=False)
class RecurringStep:
    """Single steps of a session in separate frames, which run with those of others.

    Attributes:
        position, values: Position and inputs of the last step, as sent by the client.
    """

    submitter: "FrameSubmitter"
    handle: int
    served: ServedModel
    session: Session
    position: int | None = None
    values: bytes = b""

    patient = True  # flow control limits the client
    write = staticmethod(Codec.rows_to_raw)

    def complete(self, outputs: bytes, position: int) -> None:
        submitter = self.submitter
        if not submitter.replies.closed:
            del submitter.pending[self]
            submitter.replies.answer_step(self.handle, position, outputs)

    def fail(self, error: UnrollError) -> None:
        """Answer the step with the error, or submit it again as a chunk."""
        submitter = self.submitter
        submitter.pending.pop(self, None)
        inputs = self.served.codec.from_raw(self.values, None) if isinstance(error, SessionContended) else ()
        entry = SingleEntryFrame(self.handle, 1, self.position, inputs)
        PendingChunk(submitter, entry, submitter.replies.answer)(error)

    def leave(self) -> None:
        """Cancel the step unless it is running."""
        self.served.loop.leave_joined(self.session, self)


@dataclass(slots=True, eq=False)
class PendingChunk:
    """An unanswered chunk; called with its outcome.

    Attributes:
        served, chunk: The submission, once there is one.
        attempts: Looks the session up in the store and submits the chunk again; None until that is necessary.
    """

    submitter: "FrameSubmitter"
    entry: SingleEntryFrame
    answer: Callable[[SingleEntryFrame, Reply], None]
    served: ServedModel | None = None
    chunk: Chunk | None = None
    attempts: Attempts | None = None

    def submit(self) -> None:
        try:
            self._begin()
        except NeedsStoreLookup as needed:
            self._retries().look_up(needed.session_id)

    def _begin(self) -> None:
        """Submit the chunk. Raises NeedsStoreLookup; answers the chunk with any other error."""
        submitter, entry = self.submitter, self.entry
        if submitter.replies.closed:
            return
        try:
            served, session = submitter.handles.resolve(entry.handle)
            if session.life is Life.GONE and session.durable is not None:
                served, session = submitter.handles.rebind(entry.handle, session)
            if session.own_progress.active is not None or session.life is not Life.OPEN:
                check_present(served, session)
                _check_depth(session, entry.position)
            self.served = served
            chunk = Chunk(entry.inputs, session, entry.position)
            chunk.patient = True  # flow control limits the client
            self.chunk = served.loop.submit(chunk, submitter.timeout, self)
            if self.chunk is not None:
                submitter.pending[self] = None
        except UnrollError as error:
            self._fail(error)

    def __call__(self, outcome: Outcome) -> None:
        """Answer the chunk, or submit it again if its session was updated elsewhere."""
        if self.submitter.replies.closed:
            return
        self.submitter.pending.pop(self, None)
        if not isinstance(outcome, UnrollError):
            self.answer(self.entry, outcome)
        elif not (isinstance(outcome, SessionContended) and self._retries().again()):
            self._fail(outcome)

    def _retries(self) -> Attempts:
        if self.attempts is None:
            self.attempts = Attempts(self.submitter.sessions, self.submitter.name, self._begin, self._fail)
        return self.attempts

    def _fail(self, error: UnrollError) -> None:
        if not self.submitter.replies.closed:
            self.submitter.replies.refuse(self.entry.handle, self.entry.steps, self.entry.position, error)

    def leave(self) -> None:
        """Cancel the chunk unless it is running."""
        if self.served is not None and self.chunk is not None:
            self.served.loop.leave(self.chunk, self)


class FrameSubmitter:
    """Submits the frames of a connection, as cohorts, a group, joined steps or chunks.

    Args:
        recurring: The connection's recurring frames; cleared when a handle is unbound.

    Attributes:
        pending: The unanswered chunks and joined steps, in the order of their submission.
    """

    def __init__(
        self, app: AppState, name: str, handles: Handles, recurring: RecurringFrames, replies: Replies
    ) -> None:
        self.sessions = app.sessions
        self.timeout = app.limits.request_timeout
        self.name = name
        self.handles = handles
        self._recurring = recurring
        self.replies = replies
        self.pending: dict[PendingChunk | RecurringStep, None] = {}

    def close(self) -> None:
        """Cancel all chunks that are not running, the last first, after the connection ended."""
        for pending in reversed([*self.pending]):
            pending.leave()
        self.pending.clear()
        self._recurring.clear()

    def join(self, handle: int, position: int | None, values: bytes) -> bool:
        """Join a frame of one step to the steps that wait; False if it must be submitted as an ordinary frame."""
        if self.replies.closed:
            return False
        step = self._recurring.steps.get(handle)
        if step is None:
            if (found := self.handles.find(handle)) is None:
                return False
            step = self._recurring.steps[handle] = RecurringStep(self, handle, *found)
        if not step.served.loop.join(step.session, position, values, self.timeout, step):
            return False
        step.position, step.values = position, values
        self.pending[step] = None
        return True

    def submit_frame(self, frame: Frame, faults: dict[int, UnrollError]) -> list[int]:
        """Submit the entries of a frame as cohorts if their sessions form some, else as a group.

        Args:
            frame: A frame of several entries.
            faults: Invalid entries, by index. Entries that the scheduler has no room for are added.

        Returns:
            The indexes of the remaining entries, for `submit_chunks`.
        """
        taken: set[int] = set()
        if frame.uniform_inputs is not None:
            recurring = self._recurring.recognise(frame)
            rows: list[int] | None = None  # the rows being submitted; None: all
            try:
                if not faults and self._submit_cohorts(frame, frame.uniform_inputs, recurring):
                    return []
                for served, bound in self.handles.by_model.items():
                    rows, members = _members(bound, frame.handles, faults)
                    if rows:
                        taken.update(self._submit_group(frame, served, rows, members, recurring))
            except UnrollError as error:
                faults.update(dict.fromkeys(range(len(frame.entries)) if rows is None else rows, error))
        return [i for i in range(len(frame.entries)) if i not in taken] if len(taken) < len(frame.entries) else []

    def submit_chunks(self, frame: Frame, faults: dict[int, UnrollError], entries: Iterable[int]) -> None:
        for i in entries:
            entry = SingleEntryFrame(frame.handles[i], frame.steps[i], frame.positions[i], frame.chunk(i))
            self.submit(entry, faults.get(i), self.replies.coalesce)

    def _submit_cohorts(self, frame: Frame, inputs: Tensors, recurring: RecurringFrame) -> bool:
        """Submit the frame as cohorts. False if its sessions do not form cohorts, or these cannot take the step.

        Raises QueueFull, DeadlineUnreachable.
        """
        served = recurring.served
        if served is None or sum(len(cohort.sessions) for cohort in recurring.cohorts) < len(frame.entries):
            return False
        sent = frame.entries["position"]
        positions = None if sent[0] == NO_POSITION and (sent == NO_POSITION).all() else sent
        on_reply = partial(self._complete_group, frame, None, None)
        now, groups = served.loop.clock.now(), served.scheduler.groups
        taken = groups.submit_cohorts(recurring.cohorts, positions, inputs, now, now + self.timeout, on_reply)
        served.loop.wake()
        return taken

    def _submit_group(
        self, frame: Frame, served: ServedModel, rows: list[int], members: list[Session], recurring: RecurringFrame
    ) -> list[int]:
        """Submit rows as a group. Returns the accepted rows. Raises QueueFull, DeadlineUnreachable."""
        assert frame.uniform_inputs is not None
        inputs, positions = frame.uniform_inputs, frame.positions
        whole = len(rows) == len(frame.entries)
        again = whole and recurring.served is served
        recurring.served, recurring.cohorts = served if whole else None, []
        if not whole:
            inputs = tuple(array[rows] for array in inputs)
            positions = [positions[i] for i in rows]
        on_reply = partial(self._complete_group, frame, None if whole else rows, recurring)
        now, groups = served.loop.clock.now(), served.scheduler.groups
        rejected = groups.submit(members, positions, inputs, now, now + self.timeout, on_reply, again=again)
        served.loop.wake()
        if not rejected:
            return rows
        rejected_rows = set(rejected)
        return [i for row, i in enumerate(rows) if row not in rejected_rows]

    def submit(
        self,
        entry: SingleEntryFrame,
        fault: UnrollError | None,
        answer: Callable[[SingleEntryFrame, Reply], None] | None = None,
    ) -> None:
        """Submit one chunk, or refuse it. answer: sends its reply; by default in a separate frame."""
        if fault is not None:
            self.replies.refuse(entry.handle, entry.steps, entry.position, fault)
            return
        PendingChunk(self, entry, answer or self.replies.answer).submit()

    def _complete_group(
        self, frame: Frame, rows: list[int] | None, recurring: RecurringFrame | None, reply: GroupReply
    ) -> None:
        """rows: the rows that were submitted; None for all. recurring: receives the cohort that the sessions form."""
        if self.replies.closed:
            return
        if recurring is not None and reply.cohort is not None:
            recurring.cohorts.append(reply.cohort)
        self.replies.answer_group(frame, rows, reply)


def _members(
    bound: dict[int, Session], handles: list[int], faults: dict[int, UnrollError]
) -> tuple[list[int], list[Session]]:
    """The valid entries with a handle in `bound`, and their sessions."""
    members = [session for handle in handles if (session := bound.get(handle)) is not None]
    if len(members) == len(handles) and not faults:
        return list(range(len(handles))), members
    rows = [i for i, handle in enumerate(handles) if handle in bound and i not in faults]
    return rows, [bound[handles[i]] for i in rows]


def _check_depth(session: Session, position: int | None) -> None:
    """Raises QueueFull if a new chunk (not a retry) exceeds the depth with which the stream opened the session.

    Only streams have this limit. HTTP clients cannot declare a depth, so for them the scheduler's admission decides.
    """
    if position is None or position == session.expected:
        chunks = sum(not isinstance(work, Action) for work in session.own_progress.queue())
        if chunks >= session.depth:
            raise QueueFull(f"unanswered chunks of the session: {chunks}; its depth is {session.depth}", 0.0)
