"""The page on the two orders quotes the current source code."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "layer-by-layer-or-step-by-step.md"

EXCERPTS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_page_has_excerpts() -> None:
    assert len(EXCERPTS) == 2


@pytest.mark.parametrize("excerpt", EXCERPTS)
def test_excerpt_is_in_the_source_to_the_letter(excerpt: str) -> None:
    assert (ROOT / "models" / "reference.py").read_text().count(excerpt) == 1


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text()))
def test_link_leads_somewhere(target: str) -> None:
    assert (PAGE.parent / target).is_file()


def test_picture_is_well_formed() -> None:
    assert ElementTree.parse(PAGE.with_name("lattice.svg")).getroot().tag.endswith("svg")
