"""One thread, and a place for bundles that lasts the whole session."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repository")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
