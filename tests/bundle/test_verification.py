"""The verifier finds differences of every kind and reports none for equal results."""

from dataclasses import replace

import numpy as np
import pytest
from sum_model import MANIFEST, run

from unroll.bundle import Golden, GoldenMismatch, Verifier
from unroll.bundle.verification import difference, largest, random_chunks

LENS = np.array([6, 2], np.int32)


def test_replay_runs_every_chunking(golden: Golden) -> None:
    lengths = []

    def counted(inputs, state, sequence_lens):
        lengths.append(inputs["x"].shape[1])
        return run(inputs, state, sequence_lens)

    worst = Verifier(counted, MANIFEST).replay(golden)
    assert lengths == [6, 1, 1, 1, 1, 1, 1, 2, 3, 1]
    assert worst.keys() == {"y", "last", "state_out"}
    assert max(worst.values()) < 1e-6

    lengths.clear()
    Verifier(counted, replace(MANIFEST, streamable=False, not_streamable_because="because")).replay(golden)
    assert lengths == [6]


@pytest.mark.parametrize("wrong", [1e-3, np.nan, np.inf])
def test_replay_refuses_other_answers(golden: Golden, wrong: float) -> None:
    def off(inputs, state, sequence_lens):
        outputs, after = run(inputs, state, sequence_lens)
        after[0, 0] += wrong
        return outputs, after

    with pytest.raises(GoldenMismatch, match="state_out"):
        Verifier(off, MANIFEST).replay(golden)


def test_replay_refuses_a_state_that_is_not_carried(golden: Golden) -> None:
    with pytest.raises(GoldenMismatch, match=r"in chunks \(1, 1"):
        Verifier(lambda x, state, lens: run(x, golden.state, lens), MANIFEST).replay(golden)


def test_chunked_joins_time_and_keeps_the_last(golden: Golden) -> None:
    whole = Verifier(run, MANIFEST).chunked(golden.inputs, golden.state, (6,))
    cut = Verifier(run, MANIFEST).chunked(golden.inputs, golden.state, (2, 3, 1))
    assert cut["y"].shape == (2, 6, 3)
    assert np.array_equal(cut["last"], golden.inputs["token"][:, -1])
    assert np.allclose(cut["y"], whole["y"], atol=1e-6)


def by_length(inputs, state, sequence_lens):
    """Compute the running sum with `sequence_lens`, as an exported graph does."""
    outputs, _ = run(inputs, state, sequence_lens)
    ends = np.arange(len(state)), sequence_lens - 1
    return {"y": outputs["y"], "last": inputs["token"][ends].astype(np.int32)}, outputs["y"][ends].copy()


def test_padded_rows_are_compared_with_the_row_alone(golden: Golden) -> None:
    rows = list(Verifier(by_length, MANIFEST).padded(golden.inputs, golden.state, LENS))
    assert rows == [{"y": 0.0, "last": 0.0, "state_out": 0.0}] * 2
    longest, shortest = Verifier(run, MANIFEST).padded(golden.inputs, golden.state, LENS)
    assert longest["state_out"] == 0.0
    assert shortest["state_out"] > 0.1, "the padding was added to the sum"


def test_rows_of_one_length_are_run_together_without_padding(golden: Golden) -> None:
    sizes = []

    def counted(inputs, state, sequence_lens):
        sizes.append(inputs["x"].shape[:2])
        return by_length(inputs, state, sequence_lens)

    four = {name: np.concatenate([array, array]) for name, array in golden.inputs.items()}
    lens = np.array([6, 2, 2, 6], np.int32)
    assert largest(Verifier(counted, MANIFEST).padded(four, np.concatenate([golden.state] * 2), lens))["y"] == 0.0
    assert sizes == [(4, 6), (2, 6), (2, 2)]


def test_arrays_of_other_shapes_differ_infinitely() -> None:
    assert difference(np.zeros((2, 1)), np.zeros((2, 2))) == np.inf
    assert difference(np.array([True]), np.array([False])) == 1.0


def test_the_largest_difference_is_nan_if_one_is() -> None:
    assert largest([{"y": 1.0}, {"y": 0.5}]) == {"y": 1.0}
    for order in ([1.0, np.nan], [np.nan, 1.0]):
        assert np.isnan(largest([{"y": value} for value in order])["y"])


@pytest.mark.parametrize("time", [1, 2, 3, 30])
def test_random_chunks_cover_the_sequence(time: int) -> None:
    for seed in range(20):
        chunks = random_chunks(time, np.random.default_rng(seed))
        assert sum(chunks) == time
        assert min(chunks) > 0
        assert len(chunks) > 1 or time == 1
