"""Replaces the figures in docs/benchmarks.md by those of results files; the text around them is written by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots, report


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The results of all files; for each scenario, those of the last file that has it."""
    results: dict[str, Any] = {"runs": [], "outcomes": {}}
    for file in files:
        found = json.loads(file.read_text())
        results["runs"] += found["runs"]
        results["outcomes"] |= found["outcomes"]
    return results


def write(results: Mapping[str, Any], docs: Path) -> None:
    """Replace the figures in `benchmarks.md`; write the results and the plots to the same folder."""
    report.replace_figures(docs / "benchmarks.md", figures(results, plots.draw(results, docs)))
    (docs / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")


def figures(results: Mapping[str, Any], plotted: Sequence[Path]) -> list[str]:
    lines = [*_circumstances(results), "## Targets", "", *report.markdown_verdicts(results), ""]
    for file in plotted:
        lines += [f"![{file.stem}]({file.name})", ""]
    lines += ["## All figures", ""]
    for outcome in results["outcomes"].values():
        lines += report.markdown_outcome(outcome)
    return lines


def _circumstances(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for run in results["runs"]:
        about, settings = run["about"], run["settings"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        where = f"{about['cpu']}, {len(about['cores'])} cores, {about['memory_gib']:g} GiB, Linux {about['kernel']}"
        lines.append(
            f"- {about['date']}, `{' '.join(about['command'])}`: {where}; Python {about['python']}; {versions}"
        )
        turns = f"{settings['repeats']} turns of {settings['seconds']:g} s"
        lines.append("; ".join([f"  {turns}", *run["remarks"]]))
    return [*lines, ""]
