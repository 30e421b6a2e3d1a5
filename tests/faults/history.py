"""The history checker: compares the replies to clients with the correct outputs of their sessions.

A client writes a `Track`: the acknowledged chunks in order, and every reply, including repeated ones. `check` runs each
session's whole input through plain onnxruntime and compares bit for bit. It counts faulty steps:

    lost    acknowledged, but no longer in the state
    double  in the state more often than sent
    mixed   answered or stored with another session's state
    wrong   any other difference

Only the first fault of a session counts, because it causes the later ones.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from oracle import Oracle

from unroll.service.state.snapshot import Snapshot

KINDS = ("lost", "double", "mixed", "wrong")


@dataclass
class Track:
    """One session as seen by its client.

    Attributes:
        chunks: The acknowledged chunks, each (time, features).
        sent: The unacknowledged chunk, if any. It may have been applied.
        answers: One (start, steps, outputs, position) per acknowledgement.
        complaints: One (kind, description) per invalid reply.
        state: The final snapshot.
    """

    id: str
    chunks: list[np.ndarray] = field(default_factory=list)
    sent: np.ndarray | None = None
    answers: list[tuple[int, int, bytes, int]] = field(default_factory=list)
    complaints: list[tuple[str, str]] = field(default_factory=list)
    state: bytes | None = None
    position: int = 0

    def answered(self, start: int, x: np.ndarray, outputs: bytes, position: int) -> None:
        """Record the first acknowledgement of the next chunk, or a repeated one of an earlier chunk."""
        if start == self.position:
            self.chunks.append(x)
            self.position += len(x)
            self.sent = None
        self.answers.append((start, len(x), outputs, position))

    def refused(self, start: int, code: str, expected: int | None, reply: str = "") -> None:
        """Record the refusal of a chunk at `start`, the session's position. reply: The whole reply."""
        ahead = 0 if expected is None else expected - start
        most = 0 if self.sent is None else len(self.sent)
        kind = "lost" if ahead < 0 or code.startswith("session_") else "double" if ahead > most else "wrong"
        self.complaints.append((kind, f"a chunk at {start} was refused: {code}, expected {expected}; {reply}"))

    @property
    def inputs(self) -> np.ndarray:
        return np.concatenate(self.chunks)


@dataclass
class Verdict:
    steps: int
    counts: Counter[str]
    findings: list[str]

    def __str__(self) -> str:
        return f"{self.steps} steps: " + ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS)

    @property
    def good(self) -> bool:
        return not self.findings


def check(tracks: Sequence[Track], oracle: Oracle) -> Verdict:
    counts: Counter[str] = Counter()
    findings = []
    for track in tracks:
        found = next(_faults(track, tracks, oracle), None)
        if found is not None:
            kind, steps, what = found
            counts[kind] += steps
            findings.append(f"{kind}: session {track.id}: {what}")
    return Verdict(sum(track.position for track in tracks), counts, findings)


def _faults(track: Track, others: Iterable[Track], oracle: Oracle) -> Iterator[tuple[str, int, str]]:
    """Yield (kind, steps, description) of each fault, earliest first."""
    if track.chunks:
        (whole, *_), row = oracle.all(track.inputs)
    else:
        whole, row = np.empty((0, 1), np.float32), oracle.manifest.initial_row()
    for start, steps, outputs, position in track.answers:
        if position != start + steps:
            kind = "double" if position > start + steps else "lost"
            yield kind, abs(position - start - steps), f"the steps at {start} ended at {position}"
        if outputs != whole[start : start + steps].tobytes():
            kind = _explain(track, start, steps, outputs, others, oracle)
            yield kind, steps, f"the steps at {start} were answered with {outputs.hex()}"
    for kind, what in track.complaints:
        yield kind, 1, what
    if track.state is not None:
        yield from _faults_of_state(track, row, others, oracle)


def _faults_of_state(
    track: Track, row: np.ndarray, others: Iterable[Track], oracle: Oracle
) -> Iterator[tuple[str, int, str]]:
    digest, size = oracle.manifest.digest, oracle.manifest.state_size
    snapshot = Snapshot.from_bytes(track.state or b"", digest=digest, state_size=size)
    ahead = snapshot.position - track.position
    if track.sent is not None and ahead == len(track.sent):
        row, ahead = oracle.all(track.sent, state=row)[1], 0
    if ahead:
        yield ("double" if ahead > 0 else "lost"), abs(ahead), f"it is at {snapshot.position}, not {track.position}"
    elif not np.array_equal(snapshot.row, row):
        is_other = any(other is not track and other.state and _same_row(other.state, snapshot.row) for other in others)
        yield ("mixed" if is_other else "wrong"), 1, f"its state at {snapshot.position} is not the fold of its inputs"


def _same_row(content: bytes, row: np.ndarray) -> bool:
    return content[52:-16] == row.tobytes()


def _explain(track: Track, start: int, steps: int, outputs: bytes, others: Iterable[Track], oracle: Oracle) -> str:
    """Return the kind of fault that explains the wrong outputs of this chunk."""
    position, before = 0, []
    for chunk in track.chunks:
        if position == start:
            break
        before.append(chunk)
        position += len(chunk)
    x = track.inputs[start : start + steps]
    if before and _answer(oracle, [*before[:-1], x], steps) == outputs:
        return "lost"
    if before and _answer(oracle, [*before, before[-1], x], steps) == outputs:
        return "double"
    for other in others:
        if other is not track and _is_from(other, x, outputs, oracle):
            return "mixed"
    return "wrong"


def _answer(oracle: Oracle, chunks: Sequence[np.ndarray], steps: int) -> bytes:
    return oracle(np.concatenate(chunks))[-steps:].tobytes()


def _is_from(other: Track, x: np.ndarray, outputs: bytes, oracle: Oracle) -> bool:
    """Return whether the outputs answer another chunk of `other`, or `x` applied after any chunk of `other`."""
    if any(answer == outputs for _, _, answer, _ in other.answers):
        return True
    state = oracle.manifest.initial_row()
    for chunk in other.chunks:
        state = oracle.all(chunk, state=state)[1]
        if oracle.all(x, state=state)[0][0].tobytes() == outputs:
            return True
    return False
