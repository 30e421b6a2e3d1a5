"""Draws the curves as SVG files, reproducible byte for byte."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

_COLORS = {"unroll": "#1f6feb", "echo": "#8b949e", "naive": "#d29922", "triton": "#3fa34d"}
_LABELS = {"unroll": "Unroll", "echo": "bare uvicorn echo", "naive": "naive FastAPI", "triton": "Triton"}


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the curves in the results; returns the files."""
    outcomes = results["outcomes"]
    return [
        plot(outcomes[name]["rows"], folder / f"bench-{name}.svg")
        for name, plot in (("clients", _clients), ("open-loop", _open_loop))
        if outcomes.get(name, {}).get("rows")
    ]


def _clients(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    figure, (rate, p99) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name, points in _series(rows):
        style = {"color": _COLORS[name], "label": _LABELS[name], "marker": "o", "markersize": 3}
        at = [row["at"] for row in points]
        rate.plot(at, [row["rate"] for row in points], **style)
        p99.plot(at, [row["p99_ms"] for row in points], **style)
    _axis(rate, "HTTP clients", "steps per second")
    _axis(p99, "HTTP clients", "p99 latency, ms")
    for axes in (rate, p99):
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    p99.set_yscale("log")
    rate.legend(frameon=False)
    return _save(figure, file)


def _open_loop(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, points in _series(rows):
        at = [row["rate"] for row in points]
        axes.plot(at, [row["p99_ms"] for row in points], color=_COLORS[name], label=_LABELS[name], marker="o", ms=3)
        axes.plot(at, [row["p50_ms"] for row in points], color=_COLORS[name], linestyle=":")
    _axis(axes, "steps per second, due at a fixed rate", "latency, ms (line: p99, dots: p50)")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return _save(figure, file)


def _series(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows of each curve, by server."""
    names = dict.fromkeys(row["name"] for row in rows)
    return [(name, [row for row in rows if row["name"] == name and row["at"] is not None]) for name in names]


def _axis(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file
