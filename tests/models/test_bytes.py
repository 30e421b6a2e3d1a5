"""The next-byte model is compared with n-grams, on the standard library of the running Python."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unroll.models.bytes import CHECKPOINT, CONFIG, next_byte
from unroll.models.stacked_rnn import StackedRNN
from unroll.models.training.bytes import _windows, bits_per_byte, library_source, probabilities
from unroll.models.training.ngram import NGram

Files = tuple[list[np.ndarray], list[np.ndarray]]


@pytest.fixture(scope="module")
def library() -> Files:
    return library_source()


@pytest.fixture(scope="module")
def model() -> StackedRNN:
    return StackedRNN.load(CHECKPOINT).eval()


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def test_checkpoint_is_of_the_factory(model: StackedRNN) -> None:
    assert model.config == CONFIG
    next_byte().load_state_dict(load_file(CHECKPOINT.with_suffix(".safetensors")), strict=True)


def test_split_is_by_file_and_about_one_in_ten(library: Files) -> None:
    training, held_out = library
    assert not {text.tobytes() for text in training if len(text)} & {text.tobytes() for text in held_out if len(text)}
    assert 0.05 < len(held_out) / (len(training) + len(held_out)) < 0.15


@pytest.mark.long
def test_beats_trigram_and_5_gram_on_held_out_files(model: StackedRNN, library: Files) -> None:
    training, held_out = library
    sample = [text[:4096] for text in held_out[::4]]
    lstm = bits_per_byte(probabilities(model, text) for text in sample)
    trigram, longer = (bits_per_byte(map(NGram(training, order).probabilities, sample)) for order in (3, 5))
    assert lstm < longer < trigram


def test_probabilities_do_not_depend_on_how_the_text_is_cut(model: StackedRNN, library: Files) -> None:
    text = np.concatenate(library[1])[:5000]  # longer than one piece of 4096
    with torch.inference_mode():
        whole = model(torch.from_numpy(text.astype(np.int64))[None, :-1])[0].softmax(-1)
    p = probabilities(model, text)
    assert p[0] == 1 / 256
    np.testing.assert_allclose(
        p[1:], whole.gather(1, torch.from_numpy(text.astype(np.int64))[1:, None])[:, 0], rtol=1e-3
    )


def test_training_windows_read_on_where_they_stopped() -> None:
    files = [np.arange(40_000, dtype=np.int64).astype(np.uint8)]
    windows = [window for _, window in zip(range(9), _windows(files), strict=False)]
    for before, after in pairwise(windows):
        assert torch.equal(before[:, -1], after[:, 0])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", [b"", b"a", b"abra", b"zzzz", b"zabr"])
def test_ngram_probabilities_add_up_to_one(order: int, context: bytes) -> None:
    """The contexts are seen, partly seen and unseen."""
    ngram = NGram([as_bytes(b"abracadabra"), as_bytes(b"a"), as_bytes(b"")], order)
    p = [ngram.probabilities(as_bytes(context + bytes([byte])))[-1] for byte in range(256)]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1, abs=1e-12)


def test_ngram_by_hand() -> None:
    """In "aab", a occurs twice and b once; after a, each of them occurs once.

    The discount of single bytes is 1/3; that of pairs is 1, because no pair occurs twice.
    """
    p = NGram([as_bytes(b"aab")], 2).probabilities(as_bytes(b"ab"))
    a = (2 - 1 / 3 + 1 / 3 * 2 / 256) / 3
    b = (1 - 1 / 3 + 1 / 3 * 2 / 256) / 3
    assert p == pytest.approx([a, (1 - 1 + 1 * 2 * b) / 2], abs=1e-12)


def test_ngram_that_does_not_fit_an_integer_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 8"):
        NGram([as_bytes(b"abc")], 8)
