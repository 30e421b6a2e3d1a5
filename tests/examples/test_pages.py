"""The Markdown pages: links and anchors resolve, and named files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")])

#: All files; a page may name one by the end of its path.
FILES = [
    f"/{path.relative_to(ROOT)}"
    for folder in ROOT.iterdir()
    if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith(".")
    for path in folder.rglob("*.*")
]
#: CONTRIBUTING.md names these as files not to write.
UNWANTED = {"utils.py", "helpers.py"}

_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
_PATH = re.compile(r"`(?:unroll/)?([\w./-]+\.(?:py|cu|lua))`")


def prose(page: Path) -> str:
    """Return the page without fenced blocks and measured tables."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as code hosts generate them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target, anchor in _LINK.findall(prose(page)):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(found), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path):
    named = set(_PATH.findall(prose(page))) - UNWANTED
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in FILES)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_distribution_is_called_unroll_serve(page: Path):
    """The bare name belongs to another project on the package index."""
    assert not re.search(r"pip install '?unroll(?!-serve)", page.read_text())
