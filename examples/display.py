"""Displays a stream of forecasts: redrawn in place on a terminal, sampled lines in a file or pipe."""

import shutil
import time
from collections.abc import Sequence
from datetime import date
from typing import Protocol, TextIO

import numpy as np

from unroll.client.plot import bars

_FRAME_SECONDS = 0.04
_LINES = 12
#: Columns of the plot's labels, left and right.
_MARGIN = 12
_WIDEST = 104
_CLEAR, _UP = "\x1b[2K", "\x1b[3A"


class Display(Protocol):
    def show(self, week: int, forecasts: np.ndarray) -> None:
        """Show the measurement of `week`. forecasts[i] is for week i + 1, and known for all i < week."""

    def note(self, text: str) -> None:
        """Print text between the weeks."""


class Live:
    """Shows three lines: the week with forecast and error, and two years of measurements and of forecasts as bars."""

    def __init__(self, out: TextIO, dates: Sequence[date], truth: np.ndarray) -> None:
        self._out, self._dates, self._truth = out, dates, truth
        self._width = max(8, min(shutil.get_terminal_size().columns - _MARGIN, _WIDEST))
        self._next_frame = 0.0
        self.note("")

    def show(self, week: int, forecasts: np.ndarray) -> None:
        now, last = time.monotonic(), week == len(self._truth) - 1
        if now < self._next_frame and not last:
            return
        self._next_frame = now + _FRAME_SECONDS
        first = max(1, week + 1 - self._width)
        truth, forecast = self._truth[first : week + 1], forecasts[first - 1 : week]
        low, high = min(truth.min(), forecast.min()), max(truth.max(), forecast.max())
        lines = (
            _row(self._dates, self._truth, forecasts, week),
            f"  measured  {bars(truth, low, high)}",
            f"  forecast  {bars(forecast, low, high)}",
        )
        self._out.write(_UP + "".join(f"\r{_CLEAR}{line}\n" for line in lines))
        self._out.flush()

    def note(self, text: str) -> None:
        print(text + "\n" * 3, end="", file=self._out)  # the next frame overwrites three lines


class Lines:
    """Prints a few evenly spaced weeks."""

    def __init__(self, out: TextIO, dates: Sequence[date], truth: np.ndarray, first: int) -> None:
        self._out, self._dates, self._truth = out, dates, truth
        self._sampled = set(np.linspace(max(first, 1), len(truth) - 1, _LINES).astype(int).tolist())

    def show(self, week: int, forecasts: np.ndarray) -> None:
        if week in self._sampled:
            print(_row(self._dates, self._truth, forecasts, week), file=self._out)

    def note(self, text: str) -> None:
        print(text, file=self._out)


def display(out: TextIO, dates: Sequence[date], truth: np.ndarray, first: int) -> Display:
    """The display for `out`: `Live` on a terminal, otherwise `Lines`, starting at week `first`."""
    return Live(out, dates, truth) if out.isatty() else Lines(out, dates, truth, first)


def _row(dates: Sequence[date], truth: np.ndarray, forecasts: np.ndarray, week: int) -> str:
    measured, forecast = float(truth[week]), float(forecasts[week - 1])
    return f"  {dates[week]}  measured {measured:6.2f}  forecast {forecast:6.2f}  error {forecast - measured:+5.2f} ppm"
