"""A snapshot round-trips exactly or is refused."""

import hashlib

import numpy as np
import pytest

from unroll.service.core.errors import ModelChanged, SnapshotInvalid
from unroll.service.state.snapshot import Snapshot

DIGEST = "ab" * 32
ROW = np.array([0.5, -1.25, 3e-39, 1e30], np.float32)
#: Written by release 0.1; every later release must read it.
RELEASE_0_1 = bytes.fromhex(
    "554e524c01000000abababababababababababababababababababababababababababababababab2a00000000000000"
    "040000000000003f0000a0bfc8aa2000caf24971d742d804a31044f8a470655e9227bbf5"
)


def read(content: bytes, digest: str = DIGEST) -> Snapshot:
    return Snapshot.from_bytes(content, digest=digest, state_size=4)


def test_the_bytes_of_the_first_release_are_written_and_read():
    assert Snapshot(DIGEST, 42, ROW).to_bytes() == RELEASE_0_1
    snapshot = read(RELEASE_0_1)
    assert (snapshot.digest, snapshot.position) == (DIGEST, 42)
    assert np.array_equal(snapshot.row, ROW)


def test_every_flipped_byte_and_every_truncation_is_refused():
    for i in range(len(RELEASE_0_1)):
        damaged = bytearray(RELEASE_0_1)
        damaged[i] ^= 0x40
        with pytest.raises(SnapshotInvalid):
            read(bytes(damaged))
        with pytest.raises(SnapshotInvalid):
            read(RELEASE_0_1[:i])


def test_another_model_is_refused():
    with pytest.raises(ModelChanged):
        read(RELEASE_0_1, digest="cd" * 32)


@pytest.mark.parametrize("row", [np.array([np.nan, 0, 0, 0]), np.array([np.inf, 0, 0, 0]), np.zeros(3), np.zeros(5)])
def test_a_row_that_does_not_fit_is_refused(row):
    with pytest.raises(SnapshotInvalid):
        read(Snapshot(DIGEST, 1, row.astype(np.float32)).to_bytes())


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 3, b"\0" * 4])
def test_bytes_beyond_the_row_are_refused_even_with_a_valid_checksum(extra: bytes):
    content = RELEASE_0_1[:-16] + extra
    with pytest.raises(SnapshotInvalid):
        read(content + hashlib.blake2b(content, digest_size=16).digest())
