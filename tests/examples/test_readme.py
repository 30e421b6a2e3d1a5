"""The commands and codes named in README and CONTRIBUTING exist; test_snippets.py runs the code in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_command_exists(page: str):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_code_in_the_table_is_a_code():
    page = (ROOT / "docs" / "http.md").read_text()
    codes = set(re.findall(r'code = "(\w+)"', (ROOT / "service" / "core" / "errors.py").read_text()))
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", page, re.MULTILINE)
    assert len(rows) >= 10
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} <= codes
