"""The history checker detects each kind of fault and names it correctly."""

import numpy as np
import pytest
from faults.history import Track, check
from faults.replica import ROOT
from oracle import Oracle

from unroll.service.state.snapshot import Snapshot

TINY = ROOT / "service" / "doctor"


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(TINY, "tiny")


@pytest.fixture
def tracks(oracle: Oracle) -> list[Track]:
    """Three correct sessions: chunks of one to three steps, and a retry of the last chunk."""
    rng = np.random.default_rng(3)
    return [
        served(oracle, name, [rng.standard_normal((n, 2)).astype(np.float32) for n in (1, 3, 2, 1)]) for name in "abc"
    ]


def served(oracle: Oracle, name: str, chunks: list[np.ndarray]) -> Track:
    track, state = Track(name), oracle.manifest.initial_row()
    for chunk in chunks:
        (outputs, *_), state = oracle.all(chunk, state=state)
        track.answered(track.position, chunk, outputs.tobytes(), track.position + len(chunk))
    track.answered(track.position - len(chunk), chunk, outputs.tobytes(), track.position)
    track.state = Snapshot(oracle.manifest.digest, track.position, state).to_bytes()
    return track


def test_correct_history_has_no_faults(oracle: Oracle, tracks: list[Track]) -> None:
    verdict = check(tracks, oracle)
    assert verdict.good
    assert str(verdict) == "21 steps: 0 lost, 0 double, 0 mixed, 0 wrong"


def test_unacknowledged_step_may_or_may_not_be_applied(oracle: Oracle, tracks: list[Track]) -> None:
    tracks[0].sent = np.ones((2, 2), np.float32)
    assert check(tracks, oracle).good
    applied = oracle.all(np.concatenate([tracks[0].inputs, tracks[0].sent]))[1]
    tracks[0].state = Snapshot(oracle.manifest.digest, 9, applied).to_bytes()
    assert check(tracks, oracle).good


def answer_of(oracle: Oracle, *chunks: np.ndarray) -> bytes:
    return oracle(np.concatenate(chunks))[-len(chunks[-1]) :].tobytes()


@pytest.mark.parametrize("kind", ["lost", "double", "mixed", "foreign", "wrong"])
def test_wrong_outputs_are_classified(oracle: Oracle, tracks: list[Track], kind: str) -> None:
    track, other = tracks[0], tracks[1]
    first, second, third, _ = track.chunks
    outputs = {
        "lost": answer_of(oracle, first, third),
        "double": answer_of(oracle, first, second, second, third),
        "mixed": answer_of(oracle, *other.chunks[:3], third),
        "foreign": other.answers[2][2],
        "wrong": bytes(8),
    }[kind]
    track.answers[2] = (4, 2, outputs, 6)
    assert check(tracks, oracle).counts == {"mixed" if kind == "foreign" else kind: 2}


@pytest.mark.parametrize(("position", "kind"), [(5, "lost"), (8, "double")])
def test_wrong_end_position_is_classified(oracle: Oracle, tracks: list[Track], position: int, kind: str) -> None:
    start, steps, outputs, right = tracks[0].answers[2]
    tracks[0].answers[2] = (start, steps, outputs, position)
    assert check(tracks, oracle).counts == {kind: abs(position - right)}


@pytest.mark.parametrize(
    ("code", "expected", "kind"),
    [
        ("position_gap", 4, "lost"),
        ("session_unknown", None, "lost"),
        ("position_too_old", 10, "double"),
        ("position_too_old", 9, "wrong"),
        ("payload_mismatch", 9, "wrong"),
    ],
)
def test_wrong_refusal_is_classified(
    oracle: Oracle, tracks: list[Track], code: str, expected: int | None, kind: str
) -> None:
    tracks[2].sent = np.ones((2, 2), np.float32)
    tracks[2].refused(7, code, expected)
    assert check(tracks, oracle).counts == {kind: 1}


@pytest.mark.parametrize(("kind", "position"), [("lost", 6), ("double", 8), ("mixed", 7), ("wrong", 7)])
def test_wrong_final_state_is_classified(oracle: Oracle, tracks: list[Track], kind: str, position: int) -> None:
    row = oracle.all(tracks[1].inputs)[1] if kind == "mixed" else np.ones(16, np.float32)
    tracks[0].state = Snapshot(oracle.manifest.digest, position, row).to_bytes()
    assert check(tracks, oracle).counts == {kind: 1}
