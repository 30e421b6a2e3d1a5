"""Fixtures: a scheduler and an engine that runs its batches."""

import pytest
from fold import FoldEngine, scheduler

from unroll.service.scheduler.scheduler import Scheduler


@pytest.fixture
def s() -> Scheduler:
    return scheduler()


@pytest.fixture
def engine(s: Scheduler) -> FoldEngine:
    return FoldEngine(s.rows)
