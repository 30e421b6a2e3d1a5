"""One torch thread, and a folder of bundles shared by the whole test session."""

from pathlib import Path

import pytest
import torch

from unroll.export.verification import trials
from unroll.export.verification.trials import Trial

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repository")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten loops to 64 steps, unless a number in the code requires more, and run fewer streaming probes."""
    monkeypatch.setattr(trials, "LOOP_STEPS", 64)
    monkeypatch.setattr(trials, "ORIGINAL_LONG", Trial(2, 64, 29, 30))
    monkeypatch.setattr(trials, "LONG_IF_COUNTED", 1)
    monkeypatch.setattr(trials, "STREAMING", trials.STREAMING[:2])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
