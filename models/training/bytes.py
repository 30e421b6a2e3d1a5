"""Train the next-byte model on the Python standard library's source, or measure it.

    python -m unroll.models.training.bytes              train (seven minutes on one core), save, measure
    python -m unroll.models.training.bytes --evaluate   measure the checkpoint only

The library of the running Python is split by file. A file is held out if its path hashes to a multiple of ten, so the
split is stable across Python versions.
"""

import argparse
import hashlib
import math
import platform
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from unroll.models.bytes import CHECKPOINT, next_byte
from unroll.models.stacked_rnn import StackedRNN
from unroll.models.training.descent import descend
from unroll.models.training.ngram import NGram

SEED = 1
STEPS, BATCH, WINDOW = 9000, 32, 128
LEARNING_RATE, WARM_UP = 4e-3, 200
#: The probability, per row and window, of restarting from a zero state, as every stream does once.
RESTART = 1 / 64

#: Excluded folders: tests (absent from some installations), tables of numbers, third-party files.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}

#: Unscored bytes at the start of a file, so that every compared model has enough context.
CONTEXT = 4


def library_source() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Read training files and held-out files, each (length,) uint8, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    training: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if LEFT_OUT.intersection(path.split("/")) or path.startswith("_sysconfigdata"):
            continue
        digest = hashlib.sha256(path.encode()).digest()
        files = held_out if digest[0] % 10 == 0 else training
        files.append(np.fromfile(root / path, np.uint8))
    return training, held_out


def train(files: Sequence[np.ndarray]) -> StackedRNN:
    torch.manual_seed(SEED)
    model = next_byte()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate)
    state = None
    start, nats = time.monotonic(), 0.0
    for step, window in zip(range(1, STEPS + 1), _windows(files), strict=False):
        logits, (h, c) = model.advance(window[:, :-1], state)
        loss = cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        descend(model, loss, optimizer, schedule)
        # Truncated back-propagation: the next window continues from this state, without its gradient.
        kept = torch.rand(1, BATCH, 1) >= RESTART
        state = (h.detach() * kept, c.detach() * kept)
        nats += loss.item()
        if step % 500 == 0:
            print(
                f"{step}/{STEPS}: {nats / 500 / math.log(2):.3f} bits/byte, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            nats = 0.0
    return model.eval()


def _learning_rate(step: int) -> float:
    """The factor on the peak rate: a linear warm-up, then a half cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _windows(files: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yield (BATCH, WINDOW + 1) int64 endlessly; each row continues where it stopped, overlapping by one byte."""
    generator = np.random.default_rng(SEED)
    while True:
        text = np.concatenate([files[i] for i in generator.permutation(len(files))])
        rows = text[: len(text) // BATCH * BATCH].reshape(BATCH, -1).astype(np.int64)
        for start in range(0, rows.shape[1] - WINDOW, WINDOW):
            yield torch.from_numpy(rows[:, start : start + WINDOW + 1])


def bits_per_byte(probabilities: Iterable[np.ndarray]) -> float:
    """The mean of -log2 p over each file, without its first CONTEXT bytes."""
    scored = np.concatenate([p[CONTEXT:] for p in probabilities])
    return float(-np.log2(scored).mean())


@torch.inference_mode()
def probabilities(model: StackedRNN, text: np.ndarray) -> np.ndarray:
    """The model's probability of each byte of `text`, (length,) float64; the first is 1/256."""
    p = np.full(len(text), 1 / 256)
    tokens = torch.from_numpy(text.astype(np.int64))
    state = None
    for start in range(0, len(text) - 1, 4096):
        window = tokens[start : start + 4097]
        logits, state = model.advance(window[None, :-1], state)
        log_p = logits[0].log_softmax(-1).gather(1, window[1:, None])
        p[start + 1 : start + len(window)] = log_p[:, 0].double().exp().numpy()
    return p


def evaluate(model: StackedRNN, training: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> dict[str, float]:
    """Held-out bits per byte, by model."""
    scores = {
        f"{order}-gram": bits_per_byte(map(NGram(training, order).probabilities, held_out)) for order in (1, 2, 3, 5)
    }
    return scores | {"LSTM": bits_per_byte(probabilities(model, text) for text in held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unroll.models.training.bytes", description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint, do not train")
    arguments = parser.parse_args()
    # One thread makes sums reproducible on a machine, and leaves the other cores free.
    torch.set_num_threads(1)
    training, held_out = library_source()
    print(f"Python {platform.python_version()}: {_size(training)} to train on, {_size(held_out)} held out")
    if not arguments.evaluate:
        train(training).save(CHECKPOINT)
    scores = evaluate(StackedRNN.load(CHECKPOINT).eval(), training, held_out)
    print("held out    bits per byte")
    for name, bits in scores.items():
        print(f"{name:<12}{bits:>13.3f}")


def _size(files: Sequence[np.ndarray]) -> str:
    return f"{len(files)} files ({sum(map(len, files)) / 1e6:.1f} MB)"


if __name__ == "__main__":
    main()
