"""A next-byte model of Python source: embedding, two LSTM layers, 256 logits.

Trained by `python -m unroll.models.training.bytes` on the Python standard library's own source.
"""

from pathlib import Path

from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

CHECKPOINT = Path(__file__).parent / "checkpoints" / "bytes"

#: 204k parameters, 0.8 MB in float32: small enough for the repository.
CONFIG = StackedRNNConfig(cell="lstm", vocabulary=256, embedding_size=32, hidden_size=112, layers=2, output_size=256)


def next_byte() -> StackedRNN:
    """Make the untrained model; `StackedRNN.load(CHECKPOINT)` loads the trained one.

    It takes bytes (batch, time) int64, and returns logits (batch, time, 256) of the next byte.
    """
    return StackedRNN(CONFIG)
