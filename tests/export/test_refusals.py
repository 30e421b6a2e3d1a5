"""What users read about the codes of refusals."""

import re
from pathlib import Path
from typing import get_args

from unroll.export.errors import Code

PAGE = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text()


def test_every_code_has_its_section() -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(headings))) == sorted(get_args(Code))
