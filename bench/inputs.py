"""The served models and the values that clients send: the same for every server and for the reference."""

from dataclasses import dataclass

import numpy as np

#: Distinct rows of one session, which sends them cyclically.
ROWS = 16
#: Number of sessions with distinct rows, and of whole sequences per length.
SESSIONS, SEQUENCES = 1024, 16
#: Number of sessions, and lengths of sequences, with PyTorch's outputs.
TORCH_SESSIONS, TORCH_LENGTHS = 256, (128,)


@dataclass(frozen=True, slots=True)
class Shape:
    """Recurrent layers and a linear head, with `features` inputs and outputs."""

    hidden: int
    features: int
    layers: int = 2
    cell: str = "LSTM"


MODELS = {"small": Shape(64, 16), "medium": Shape(256, 64)}
#: The models of which only the scenario `models` takes measurements: their export takes a minute.
LARGE = {"gru-512": Shape(512, 64, 3, "GRU"), "lstm-1024": Shape(1024, 64, 4)}


def rows(features: int) -> np.ndarray:
    """Inputs of the sessions, step by step: (SESSIONS, ROWS, features) float32."""
    return np.random.default_rng(features).standard_normal((SESSIONS, ROWS, features), np.float32)


def sequences(features: int, length: int) -> np.ndarray:
    """Whole sequences: (SEQUENCES, length, features) float32."""
    return np.random.default_rng((features, length)).standard_normal((SEQUENCES, length, features), np.float32)
