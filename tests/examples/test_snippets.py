"""Every command and program on the README and the pages runs, or the page states why not."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from snippets import PAGES, ROOT, Reader, blocks, rounded, train


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=name)
def test_code_on_the_page_runs_as_shown(
    page: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    environment: dict[str, str],
    serve: Callable,
    made_once: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    """Blocks run in order in one folder. An output shown after a block must match."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    trained = made_once("classifier", train)
    reader = Reader(tmp_path, trained, environment, serve, lambda: request.getfixturevalue("server"))
    printed = None
    try:
        for block in blocks(page):
            if block.runs:
                printed = reader.paste(block)
            elif block.language == "text" and printed is not None:
                shown = ".*".join(re.escape(part) for part in rounded(block.text).split("…"))
                assert re.fullmatch(shown, rounded(printed)), f"{printed}\nis not as shown:\n{block.text}"
                printed = None
            else:
                printed = None
    finally:
        reader.close()


def test_every_block_is_run_or_says_why_not():
    """`pytest -s` prints the counts."""
    counts: Counter[str] = Counter()
    for page in PAGES:
        for block in blocks(page):
            if not block.is_program:
                assert block.language in {"", "text", "json", "yaml", "toml", "nginx"}, (
                    f"{name(page)}: a block of {block.language}"
                )
                counts["shown"] += 1
                continue
            assert (block.mark in ("not run", "run by")) == bool(block.note), f"{name(page)}: {block.text}"
            counts[block.mark if block.note and block.mark else "run"] += 1
            if block.mark == "run by":
                assert (ROOT / str(block.note)).is_file(), f"{name(page)}: {block.note} does not exist"
    others = f"{counts['run by']} by other tests, {counts['not run']} not"
    print(f"\n{counts['run']} run here, {others}; {counts['shown']} show something")
    assert counts["run"] > counts["not run"]


def test_no_fence_is_overlooked():
    for page in PAGES:
        fences = re.findall(r"^\s*```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), name(page)
