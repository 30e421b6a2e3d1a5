"""The sound detector on synthesised sound outside its training set."""

import numpy as np
import pytest
import torch

from unroll.models import synthesis
from unroll.models.sound import EVENTS, SoundDetector, load
from unroll.models.training import sound


@pytest.fixture(scope="module")
def model() -> SoundDetector:
    return load()


def test_detector_finds_events_with_few_false_alarms(model: SoundDetector) -> None:
    scores = sound.evaluate(model, clips=40)
    assert set(scores) == set(EVENTS)
    for name, score in scores.items():
        assert score.found > 0.85, name
        assert score.false < 0.03, name


@torch.inference_mode()
def test_second_clap_is_an_event_and_a_single_one_is_not(model: SoundDetector) -> None:
    """Both claps sound alike; only the state distinguishes them."""
    highest = {}
    for kind in ("clap", "claps"):
        clips = [synthesis.single(kind, np.random.default_rng(seed)).samples for seed in range(20)]
        highest[kind] = model(torch.from_numpy(np.stack(clips)))[..., 1].amax(1)
    assert (highest["claps"] > sound.THRESHOLD).float().mean() > 0.8
    assert (highest["clap"] > sound.THRESHOLD).float().mean() < 0.2


@torch.inference_mode()
def test_silence_raises_no_event(model: SoundDetector) -> None:
    assert model(torch.zeros(1, 500, synthesis.FRAME)).max() < sound.THRESHOLD
