"""How a notebook displays the export report."""

import re
from dataclasses import replace
from pathlib import Path

from tests.bundle.sum_model import MANIFEST
from unroll.bundle import Parity
from unroll.export import Report


def test_a_notebook_shows_a_table_with_a_bar_for_each_output() -> None:
    errors = {"y": 1e-9, "large": 1e-7, "too large": 1e-3}
    parity = tuple(Parity(name, error, 1e-7, 1e-6) for name, error in errors.items())
    report = Report(Path("models/sum/2"), replace(MANIFEST, parity=parity), ("a <note>",))

    shown = report._repr_html_()

    assert "<td style='text-align:left'>a &lt;note&gt;</td>" in shown
    assert [name in shown for name in errors] == [True] * 3
    small, large, full = map(int, re.findall(r"<rect width='(\d+)' height='10' fill='#2a7'/>", shown))
    assert 0 < small < large < full == 200
