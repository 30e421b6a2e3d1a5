"""The report as HTML for notebooks: a table, and an error bar for each output."""

import math
from html import escape

from unroll.bundle import Manifest, Parity

#: The size of an error bar in pixels, and the error at the start of its logarithmic scale.
_WIDTH, _HEIGHT, _LEAST = 200, 10, 1e-12


def as_html(rows: list[tuple[str, str]], manifest: Manifest) -> str:
    facts = "".join(f"<tr><th style='text-align:left'>{escape(name)}</th>{_cell(text)}</tr>" for name, text in rows)
    head = "".join(f"<th>{name}</th>" for name in ("output", "onnxruntime", "", "PyTorch float32", "tolerance"))
    errors = "".join(
        f"<tr>{_cell(p.output)}{_cell(f'{p.onnxruntime:.2e}')}<td>{_bar(p)}</td>"
        f"{_cell(f'{p.torch_float32:.2e}')}{_cell(f'{p.tolerance:.2e}')}</tr>"
        for p in manifest.parity
    )
    return (
        f"<h4>{escape(manifest.name)} version {escape(manifest.version)}</h4><table>{facts}</table>"
        f"<table><caption>difference from PyTorch float64</caption><tr>{head}</tr>{errors}</table>"
    )


def _cell(text: str) -> str:
    return f"<td style='text-align:left'>{escape(text)}</td>"


def _bar(parity: Parity) -> str:
    """A bar that is full at the tolerance; the mark shows PyTorch's own float32 error."""
    error, own = (_share(value, parity.tolerance) for value in (parity.onnxruntime, parity.torch_float32))
    title = f"{parity.onnxruntime:.2e} of {parity.tolerance:.2e} allowed; PyTorch float32: {parity.torch_float32:.2e}"
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img'><title>{title}</title>"
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#ddd'/>"
        f"<rect width='{error * _WIDTH:.0f}' height='{_HEIGHT}' fill='#2a7'/>"
        f"<rect x='{own * (_WIDTH - 2):.0f}' width='2' height='{_HEIGHT}' fill='#333'/></svg>"
    )


def _share(value: float, most: float) -> float:
    """The position of an error between `_LEAST` and `most` on a logarithmic scale, from 0 to 1."""
    if value <= _LEAST or most <= _LEAST:
        return 0.0
    return min(math.log(value / _LEAST) / math.log(most / _LEAST), 1.0)
