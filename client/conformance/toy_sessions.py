"""The sessions of the toy models, as on a server: positions, retries, tombstones. Without I/O."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unroll.client.conformance.refusals import Refusal
from unroll.client.conformance.snapshots import read_snapshot, snapshot_of
from unroll.client.conformance.toy_models import MODELS, ToyModel, bytes_of


@dataclass
class Reply:
    """The answer to a chunk: the content that a retry must repeat, the position after it, and the outputs."""

    content: bytes
    end: int
    outputs: list[np.ndarray]

    @property
    def steps(self) -> int:
        return len(self.outputs[0])


@dataclass
class ToySession:
    """A session.

    Attributes:
        states: The states by position, from the first one on.
        moved_to: The place to which another client has moved the session.
    """

    id: str
    model: ToyModel
    durability: str
    position: int
    states: dict[int, float]
    depth: int = 1
    replies: dict[int, Reply] = field(default_factory=dict)
    moved_to: tuple[int, float] | None = None

    @property
    def place(self) -> tuple[int, float]:
        return self.position, self.state

    @property
    def state(self) -> float:
        return self.states[self.position]

    def apply(self, position: int, inputs: Sequence[np.ndarray], content: bytes | None = None) -> Reply:
        """Apply a chunk, or answer its retry: one with equal content, by default the values. Raises Refusal."""
        if content is None:
            content = b"".join(array.tobytes() for array in inputs)
        return self.answered(position, content) or self._advance(content, inputs)

    def answered(self, position: int, content: bytes) -> Reply | None:
        """The answer to a chunk that was already applied; None if it can be applied. Raises Refusal."""
        if (kept := self.replies.get(position)) is not None:
            if kept.content == content:
                return kept
            raise self._refusal("payload_mismatch", f"the chunk at {position} was applied with other values")
        if position != self.position:
            raise self.misplaced(position)
        return None

    def misplaced(self, position: int) -> Refusal:
        code = "position_gap" if position > self.position else "position_too_old"
        return self._refusal(code, f"the session is at {self.position}, the chunk begins at {position}")

    def _advance(self, content: bytes, inputs: Sequence[np.ndarray]) -> Reply:
        begin = self.position
        states = self.model.states(self.state, inputs)
        self.states |= {begin + 1 + step: state for step, state in enumerate(states)}
        self.position += len(states)
        reply = Reply(content, self.position, self.model.outputs_of(states, begin))
        self.replies[begin] = reply
        for old in sorted(self.replies)[: -self.depth]:
            del self.replies[old]
        return reply

    def _refusal(self, code: str, detail: str) -> Refusal:
        return Refusal(code, detail, expected=self.position)

    def move(self, steps: int) -> None:
        """Apply steps of another client; a negative number loses the last steps instead."""
        if steps > 0:
            for _ in range(steps):
                self._advance(b"of another client", self.model.inputs_of_raw(bytes(self._bytes_of_step()), 1))
        else:
            self.position += steps
            self.replies.clear()
        self.moved_to = self.place

    def _bytes_of_step(self) -> int:
        return sum(bytes_of(spec, 1) for spec in self.model.inputs)

    def snapshot(self) -> bytes:
        return snapshot_of(self.model.digest, self.position, self.state)

    def description(self) -> dict[str, Any]:
        model = self.model
        return {
            "session_id": self.id,
            "position": self.position,
            "durability": self.durability,
            "idle_timeout": 60.0,
            "model": model.name,
            "model_version": model.version,
            "model_digest": model.digest,
        }


class ToySessions:
    """The server's sessions, and the error codes of ended ones."""

    def __init__(self) -> None:
        self._open: dict[str, ToySession] = {}
        self.ended: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._open)

    def get(self, session_id: str) -> ToySession | None:
        return self._open.get(session_id)

    def find(self, session_id: str) -> ToySession:
        """Find an open session. Raises Refusal."""
        if (session := self._open.get(session_id)) is not None:
            return session
        code = self.ended.get(session_id, "session_unknown")
        raise Refusal(code, f"session {session_id!r}: {code.replace('_', ' ')}")

    def open(
        self,
        model: ToyModel,
        session_id: str | None,
        durability: str | None = None,
        *,
        static: Mapping[str, Any] | None = None,
        snapshot: bytes | None = None,
    ) -> ToySession:
        """Open a session; a client-held one is not kept. Raises Refusal."""
        position, state = (0, model.first_state(static)) if snapshot is None else read_snapshot(snapshot, model.digest)
        chosen = session_id or secrets.token_urlsafe(16)
        session = ToySession(chosen, model, durability or "memory", position, {position: state})
        if durability != "client":
            self._add(session)
        return session

    def fork(self, session: ToySession, session_id: str | None) -> ToySession:
        """Fork a session. Raises Refusal."""
        chosen, states = session_id or secrets.token_urlsafe(16), dict(session.states)
        fork = ToySession(chosen, session.model, session.durability, session.position, states)
        self._add(fork)
        return fork

    def _add(self, session: ToySession) -> None:
        if (taken := self._open.get(session.id)) is not None:
            raise Refusal("session_exists", f"session {session.id!r} is open", position=taken.position)
        self._open[session.id] = session
        self.ended.pop(session.id, None)

    def end(self, session: ToySession, code: str) -> None:
        del self._open[session.id]
        self.ended[session.id] = code

    def restart(self, *, kept: bool) -> None:
        """Restart the server; sessions survive if they are `kept` in a store."""
        if not kept:
            self._open.clear()
            self.ended.clear()


def model_of(reference: str) -> ToyModel:
    """Look up `name` or `name:version`. Raises Refusal."""
    name, _, version = reference.partition(":")
    if name not in MODELS or version not in ("", MODELS[name].version):
        raise Refusal("model_unknown", f"there is no model {reference!r}")
    return MODELS[name]
