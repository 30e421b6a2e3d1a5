"""The site that `make docs` builds from the pages."""

import re
import sys
from pathlib import Path
from subprocess import run

import pytest
from waiting import PATIENCE

ROOT = Path(__file__).parents[2]
#: Resources that a browser loads with a page.
_LOADED = re.compile(
    r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* rel="(?:stylesheet|icon|preload)"[^>]* href="([^"]+)"'
)


@pytest.mark.long
def test_site_is_built_without_a_broken_link_and_asks_no_other_host(tmp_path: Path):
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="the extra `docs` is not installed: make docs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path]
    built = run(build, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {"index.html", "quick-start.html", "your-own-model.html", "api.html", "project/architecture.html"} <= {
        *pages
    }
    assert all(name in pages["api.html"] for name in ("unroll.client.Client.session", "exporter.export", "PositionGap"))
    for name, page in pages.items():
        elsewhere = [url for pair in _LOADED.findall(page) for url in pair if url.startswith(("http:", "https:", "//"))]
        assert elsewhere == [], name
