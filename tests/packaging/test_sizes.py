"""Files, classes and functions have size limits, to keep the code readable."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("bundle", "client", "examples", "export", "models", "service", "src/unroll/commands")
MOST_LINES = {ast.Module: 450, ast.ClassDef: 300, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}


def too_long(path: Path) -> Iterator[str]:
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module):
            lines = len(text.splitlines())
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
        else:
            continue
        if lines > MOST_LINES[type(node)]:
            yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the file')} has {lines} lines"


def test_files_classes_and_functions_are_short() -> None:
    """Docstrings do not count."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert [found for path in paths for found in too_long(path)] == []


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest would import one instead of the other."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []
