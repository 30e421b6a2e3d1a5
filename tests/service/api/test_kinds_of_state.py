"""State that export adds to the row besides h and c, served to clients at different positions."""

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from served_models import models
from serving import RAW, Running, Serve, raw_steps

from unroll import bundle


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = bundle.read(models.BUNDLES / "mixed" / "1").manifest
    assert {slot.kind for slot in manifest.state} == {"h", "c", "carry", "past", "count", "static"}
    return models.link(tmp_path_factory.mktemp("mixed"), "mixed")


@pytest.fixture
def running(serve: Serve, mixed: Path) -> Running:
    return serve(repository=mixed)


def test_sessions_at_different_positions_share_batches(running: Running) -> None:
    rng = np.random.default_rng(2)
    x, known = rng.standard_normal((3, 20, 3), np.float32), rng.standard_normal((3, 2), np.float32)
    model = models.build("mixed/1").module
    with torch.no_grad():
        expected = model(torch.from_numpy(x), torch.from_numpy(known), torch.zeros(3, 2, 3))[0].numpy()
    answers: list[list[bytes]] = [[], [], []]
    done = [0, 0, 0]
    with httpx.Client(base_url=f"{running.url}/v1/models/mixed") as http:
        opened = [http.post("/sessions", json={"static": {"known": row.tolist()}}).json() for row in known]
        names = [each["session_id"] for each in opened]
        while min(done) < 20:
            for row in rng.permutation(3):
                steps = min(int(rng.integers(0, 5)), 20 - done[row])
                if not steps:
                    continue
                piece = x[row, done[row] : done[row] + steps]
                answers[row].append(
                    http.post(
                        f"/sessions/{names[row]}/steps", content=piece.tobytes(), headers=raw_steps(piece)
                    ).content
                )
                done[row] += steps
            if 8 < done[0] < 20:  # continue in another session from a snapshot
                snapshot = http.get(f"/sessions/{names[0]}/state").content
                names[0] = http.post("/sessions", content=snapshot, headers=RAW).json()["session_id"]
    found = np.stack([np.frombuffer(b"".join(parts), np.float32).reshape(20, 4) for parts in answers])
    assert np.abs(found - expected).max() < 2e-6
