"""The answer to a chunk, and what is kept of an applied chunk so that its retry gets the same answer."""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import Tensors

#: A copy of it takes half the time of a new one.
_NOTHING: Final = hashlib.blake2b(digest_size=16)


@dataclass(slots=True, eq=False)
class Reply:
    """The answer to a chunk.

    outputs: as the model returns them, without the batch axis; they may be views into a whole batch, so keep a `copy`.
    position: time steps the session has consumed, this chunk included.
    kept: false if there was no room to keep the reply: a retry of the chunk is refused.
    """

    outputs: Tensors
    position: int
    kept: bool = True

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.outputs)

    def copy(self) -> "Reply":
        return Reply(tuple(array.copy() for array in self.outputs), self.position)


Outcome = Reply | UnrollError


@dataclass(frozen=True, slots=True)
class AppliedChunk:
    """A chunk that a session consumed.

    start: its position. digest: of its payload, by which a retry is recognised. reply: None if it was not kept.
    """

    start: int
    digest: bytes
    reply: Reply | None

    @property
    def nbytes(self) -> int:
        return 0 if self.reply is None else self.reply.nbytes


def payload_digest(inputs: Tensors) -> bytes:
    """Digest of a payload's values: the same for every encoding in which a client can send them."""
    digest = _NOTHING.copy()
    for array in inputs:
        digest.update(array.tobytes())
    return digest.digest()


def payload_digests(rows: np.ndarray) -> list[bytes]:
    """`payload_digest` of many payloads; rows: the values of each one after another, (payloads, bytes), uint8."""
    digests = []
    for row in rows:
        digest = _NOTHING.copy()
        digest.update(row)
        digests.append(digest.digest())
    return digests
