"""Replies to chunks, and the digests that identify retries."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from unroll.service.core.errors import UnrollError
from unroll.service.engine.engine import Tensors

#: Copying a hash object takes half the time of creating one.
_NOTHING: Final = hashlib.blake2b(digest_size=16)


@dataclass(slots=True, eq=False)
class Reply:
    """The answer to a chunk.

    Attributes:
        outputs: The model's outputs without the batch axis. They may be views of a whole batch; to keep them, `copy`.
        position: Time steps that the session has consumed, including this chunk.
        kept: False if there was no room to keep the reply; a retry of the chunk is then refused.
    """

    outputs: Tensors
    position: int
    kept: bool = True

    def copy(self) -> "Reply":
        return Reply(tuple(array.copy() for array in self.outputs), self.position)


Outcome = Reply | UnrollError


def to_bytes(tensors: Tensors) -> bytes:
    return tensors[0].tobytes() if len(tensors) == 1 else b"".join([array.tobytes() for array in tensors])


def payload_digest(inputs: Tensors) -> bytes:
    """Digest of a payload's values, independent of the client's encoding."""
    digest = _NOTHING.copy()
    for array in inputs:
        digest.update(array.tobytes())
    return digest.digest()


def payload_digests(payloads: Iterable[bytes]) -> list[bytes]:
    """`payload_digest` of each payload; payloads: concatenated values."""
    digests = []
    for payload in payloads:
        digest = _NOTHING.copy()
        digest.update(payload)
        digests.append(digest.digest())
    return digests
