"""The report as HTML, for a notebook: a table, and for each output a bar of its error."""

import math
from html import escape

from unroll.bundle import Manifest, Parity

#: Of the bars. They are logarithmic, and begin at this error.
_WIDTH, _HEIGHT, _LEAST = 200, 10, 1e-12


def as_html(rows: list[tuple[str, str]], manifest: Manifest) -> str:
    """rows: what is said of the bundle, each with its name."""
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
    """The error on a line that ends at the tolerance; the mark is PyTorch's own error in float32."""
    error, own = (_share(value, parity.tolerance) for value in (parity.onnxruntime, parity.torch_float32))
    title = f"{parity.onnxruntime:.2e} of {parity.tolerance:.2e} allowed; PyTorch float32: {parity.torch_float32:.2e}"
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img'><title>{title}</title>"
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#ddd'/>"
        f"<rect width='{error * _WIDTH:.0f}' height='{_HEIGHT}' fill='#2a7'/>"
        f"<rect x='{own * (_WIDTH - 2):.0f}' width='2' height='{_HEIGHT}' fill='#333'/></svg>"
    )


def _share(value: float, most: float) -> float:
    """Of the way from the least error to the most, on a logarithmic scale."""
    if value <= _LEAST or most <= _LEAST:
        return 0.0
    return min(math.log(value / _LEAST) / math.log(most / _LEAST), 1.0)
