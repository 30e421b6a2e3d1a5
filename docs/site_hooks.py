"""Fits the pages of the repository into the site: the README is its first page, and links stay inside it.

On a code host the same Markdown is read where it lies. The pages at the top of the repository become pages of the site;
a link to another file outside docs/ becomes the file's path.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Pages outside docs/, and where they are in the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)]*)?\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links changed; fenced blocks stay as they are."""
    place = {target: source for source, target in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pieces = _FENCE.split(markdown)
    fences = _FENCE.findall(markdown)
    changed = [_LINK.sub(lambda link: _link(link, place, page.file.src_uri), piece) for piece in pieces]
    return "".join(piece + fence for piece, fence in zip(changed, [*fences, ""], strict=True))


def _link(link: re.Match[str], source: str, page: str) -> str:
    """The link, read from the file `source` of the repository, as the site's page `page` needs it."""
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
    target = PAGES.get(named) or (named.removeprefix("docs/") if named.startswith("docs/") else None)
    if target is None:
        path = f"`{named}`"
        return path if named.endswith(link["text"].strip("`")) else f"{link['text']} ({path})"
    relative = posixpath.relpath(target, posixpath.dirname(page) or ".")
    return f"{link['image']}[{link['text']}]({relative}{link['anchor'] or ''})"
