"""One-line plots, with a character per value."""

import shutil
from collections import deque
from collections.abc import Sequence
from typing import TextIO

import numpy as np

_BARS = "▁▂▃▄▅▆▇█"
_WIDEST = 100
_MOST_ROWS = 8


class Plot:
    """Plots the latest values of each output: redrawn in place on a terminal, otherwise drawn once at the end."""

    def __init__(self, out: TextIO, names: Sequence[str]) -> None:
        self._out, self._names = out, names[:_MOST_ROWS]
        self._margin = max(map(len, self._names), default=0) + 30
        width = max(10, min(shutil.get_terminal_size().columns, _WIDEST) - self._margin)
        self._values: deque[np.ndarray] = deque(maxlen=width)
        self._drawn = False

    def add(self, arrays: Sequence[np.ndarray]) -> None:
        """Add the outputs of one time step."""
        values = [np.ravel(array).astype(np.float64) for array in arrays]
        self._values.append(np.concatenate(values)[: len(self._names)])

    def draw(self, *, end: bool = False) -> None:
        """Draw the plot if this is a terminal, or the end."""
        terminal = self._out.isatty()
        if not self._values or not (terminal or end):
            return
        if self._drawn:
            self._out.write(f"\x1b[{len(self._names)}A")
        for name, values in zip(self._names, np.array(self._values).T, strict=True):
            low, high = values.min(), values.max()
            clear = "\r\x1b[2K" if terminal else ""
            width = max(map(len, self._names))
            self._out.write(f"{clear}{name:<{width}}  {bars(values, low, high)}  {low:.4g} to {high:.4g}\n")
        self._out.flush()
        self._drawn = True


def bars(values: np.ndarray, low: float, high: float) -> str:
    """One character per value, from ▁ at `low` to █ at `high`."""
    scaled = (values - low) / max(high - low, 1e-9) * (len(_BARS) - 1)
    return "".join(_BARS[level] for level in scaled.round().astype(int))
