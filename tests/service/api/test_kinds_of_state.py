"""What export puts into the state row besides h and c, of clients that are not equally far, through a server."""

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from serving import RAW, Running, Serve, raw_steps
from torch import Tensor, nn

import unroll


class Mixed(nn.Module):
    """A difference from the step before, a position, a cache that it is handed, an initial state that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.start = nn.Linear(2, 5)
        self.rnn = nn.GRU(4, 5, batch_first=True)
        self.top = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor, known: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        x = x - torch.cat([x[:, :1], x[:, :-1]], 1) + 0.1 * torch.arange(x.shape[1])[:, None]
        joined = torch.cat([cache, x], 1)
        y = self.conv(joined.transpose(1, 2)).transpose(1, 2)
        return self.top(self.rnn(y, self.start(known)[None])[0])[0], joined[:, -2:]


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(5)
    return Mixed().eval()


@pytest.fixture(scope="module")
def mixed(model: Mixed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    example = {"x": torch.randn(2, 9, 3), "known": torch.randn(2, 2), "cache": torch.zeros(2, 2, 3)}
    report = unroll.export(model, example, name="mixed", repository=path, static=["known"], state={"cache": "y1"})
    assert {slot.kind for slot in report.manifest.state} == {"h", "c", "carry", "past", "count", "static"}
    assert report.manifest.streamable
    return path


@pytest.fixture
def running(serve: Serve, mixed: Path) -> Running:
    return serve(repository=mixed)


def test_sessions_that_are_not_equally_far(running: Running, model: Mixed) -> None:
    rng = np.random.default_rng(2)
    x, known = rng.standard_normal((3, 20, 3), np.float32), rng.standard_normal((3, 2), np.float32)
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
            if 8 < done[0] < 20:  # continues in another session, from a snapshot
                snapshot = http.get(f"/sessions/{names[0]}/state").content
                names[0] = http.post("/sessions", content=snapshot, headers=RAW).json()["session_id"]
    found = np.stack([np.frombuffer(b"".join(parts), np.float32).reshape(20, 4) for parts in answers])
    assert np.abs(found - expected).max() < 2e-6
