"""The envelope of the binary formats: valid bytes round-trip, all other bytes are refused."""

import pytest

from unroll.service.core.errors import SnapshotInvalid
from unroll.service.state.envelope import Envelope

ENVELOPE = Envelope(b"TEST", 3, "a test", fields=4, tags=2)
CONTENT = ENVELOPE.header(1) + b"content"


def test_header_and_content_come_back() -> None:
    sealed = ENVELOPE.seal(CONTENT)
    assert sealed[:8] == b"TEST\x03\x00\x01\x00"
    assert ENVELOPE.unseal(sealed) == CONTENT
    assert ENVELOPE.read_header(CONTENT) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a test"),
        (ENVELOPE.header() + b"few", "not a test"),
        (b"OTHER" + CONTENT[5:], "not a test"),
        (b"TEST\x04" + CONTENT[5:], "in format 4; this server reads format 3"),
        (b"TEST\x03\x00\x02\x00" + CONTENT[8:], "in format 3"),  # an unknown tag
        (b"TEST\x03\x00\x00\x01" + CONTENT[8:], "in format 3"),  # the reserved byte
    ],
)
def test_another_format_is_refused_whatever_its_checksum(content: bytes, why: str) -> None:
    for refused in (lambda: ENVELOPE.read_header(content), lambda: ENVELOPE.unseal(ENVELOPE.seal(content))):
        with pytest.raises(SnapshotInvalid, match=why):
            refused()


def test_damaged_content_is_refused() -> None:
    sealed = bytearray(ENVELOPE.seal(CONTENT))
    sealed[9] ^= 1
    with pytest.raises(SnapshotInvalid, match="is damaged"):
        ENVELOPE.unseal(bytes(sealed))
