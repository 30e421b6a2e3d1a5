"""An n-gram model of bytes, the baseline for the next-byte model.

Interpolated absolute discounting (Ney, Essen and Kneser 1994; evaluated by Chen and Goodman 1999): each order subtracts
a discount D from every count, and gives the saved mass to the next lower order,

    p(b | context) = (max(count(context b) - D, 0) + D * kinds(context) * p(b | shorter context)) / total(context)

down to the uniform distribution. `kinds` is the number of distinct bytes that followed the context. D = n1 / (n1 + 2
n2), where n1 and n2 are the numbers of n-grams that occurred once and twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class _Order:
    """The counts of one order, with sorted keys for binary search."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float


class NGram:
    """An n-gram model fitted on `texts`, each (length,) uint8. Order 3 has two bytes of context; 7 is the maximum."""

    def __init__(self, texts: Sequence[np.ndarray], order: int) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"order is {order}, outside 1..7 (an n-gram is packed into 63 bits)")
        self._orders = [_count(texts, n) for n in range(1, order + 1)]

    def probabilities(self, text: np.ndarray) -> np.ndarray:
        """The model's probability of each byte of `text`, (length,) float64."""
        p = np.full(len(text), 1 / 256)
        for n, order in enumerate(self._orders, start=1):
            grams = _pack(text, n)
            count = _look_up(order.grams, order.counts, grams)
            total = _look_up(order.contexts, order.totals, grams >> 8)
            kinds = _look_up(order.contexts, order.kinds, grams >> 8)
            lower = p[n - 1 :]
            higher = (np.maximum(count - order.discount, 0) + order.discount * kinds * lower) / np.maximum(total, 1)
            p[n - 1 :] = np.where(total > 0, higher, lower)
        return p


def _count(texts: Sequence[np.ndarray], n: int) -> _Order:
    grams, counts = np.unique(np.concatenate([_pack(text, n) for text in texts]), return_counts=True)
    contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once else 0.0
    return _Order(grams, counts, contexts, np.add.reduceat(counts, first), kinds, discount)


def _pack(text: np.ndarray, n: int) -> np.ndarray:
    """Pack every n-gram of `text` into an integer, last byte lowest, (length - n + 1,) int64."""
    grams = np.zeros(max(len(text) - n + 1, 0), np.int64)
    for i in range(n):
        grams = (grams << 8) | text[i : i + len(grams)]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, or 0 if it is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
