"""Sessions opened and closed in every way leave nothing behind."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from faults.soak import Soak


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    with closing(Soak(tmp_path)) as soak:
        yield soak


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_closed_sessions_leave_nothing_behind(soak: Soak) -> None:
    """`make soak` also measures memory, over a million sessions."""
    soak.round()
    before = soak.census()
    cycles = sum(soak.round() for _ in range(2))
    after = soak.census()
    assert after.tables() == before.tables()
    assert after.objects - before.objects < 0.1 * cycles
