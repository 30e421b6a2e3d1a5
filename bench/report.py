"""Results as tables for the terminal and for Markdown, both from the JSON document."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
_BEGIN, _END = "<!-- figures: begin -->", "<!-- figures: end -->"
_LIMIT = "at least: the load generator is the limit"


def replace_figures(page: Path, lines: Sequence[str]) -> None:
    """Replace the lines between the page's markers. Raises ValueError without markers."""
    before, _, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"{page} has no place for figures: {_BEGIN} … {_END}")
    page.write_text("\n".join([before + _BEGIN, "", *lines, _END + after]))


def table(outcome: Document) -> str:
    """An outcome as a table for the terminal."""
    lines = [f"\n{outcome['title']}"]
    if outcome["rows"]:
        lines.append(f"  {'':<18}{'at':>6}{outcome['unit'] + ' (min–max)':>32}{'p50 ms':>10}{'p99 ms':>10}")
    for row in outcome["rows"]:
        figures = f"{_rate(row):>32}{row['p50_ms']:>10.3f}{row['p99_ms']:>10.3f}"
        remark = f"  {_LIMIT}" if row["load_bound"] else ""
        lines.append(f"  {row['name']:<18}{_at(row):>6}{figures}{remark}")
    lines.extend(f"  {_mark(verdict)} {verdict['says']}: {reached(verdict)}" for verdict in outcome["verdicts"])
    lines.extend(f"  Note: {remark}" for remark in outcome["remarks"])
    if outcome["failed"]:
        lines.append(f"  FAILED: {outcome['failed']}")
    return "\n".join(lines)


def verdicts(results: Document) -> list[Document]:
    found = [verdict for outcome in results["outcomes"].values() for verdict in outcome["verdicts"]]
    return sorted(found, key=lambda verdict: verdict["number"])


def markdown_verdicts(results: Document) -> list[str]:
    lines = ["| | | reached (min–max of the turns) | target | |", "|--:|---|--:|--:|---|"]
    for verdict in verdicts(results):
        value = _reached(verdict)
        lines.append(f"| {verdict['number']} | {verdict['says']} | {value} | {_bound(verdict)} | {_mark(verdict)} |")
    return lines


def markdown_outcome(outcome: Document) -> list[str]:
    lines = [f"### {outcome['title']}", ""]
    if outcome["rows"]:
        lines += [f"| | | {outcome['unit']} (min–max) | p50 ms | p99 ms |", "|---|---|--:|--:|--:|"]
    for row in outcome["rows"]:
        name = row["name"] + (f", {_at(row)}" if row["at"] is not None else "")
        what = row["what"] + (f" ({_LIMIT})" if row["load_bound"] else "")
        lines.append(f"| {name} | {what} | {_rate(row)} | {row['p50_ms']:.3f} | {row['p99_ms']:.3f} |")
    lines += [""] if outcome["rows"] else []
    lines += [f"- {remark}" for remark in outcome["remarks"]]
    if outcome["failed"]:
        lines.append(f"- Failed: {outcome['failed'].splitlines()[0]}")
    return [*lines, ""] if lines[-1] else lines


def reached(verdict: Document) -> str:
    return f"{_reached(verdict)}, target {_bound(verdict)}"


def _reached(verdict: Document) -> str:
    if verdict["value"] is None:
        return "not measured"
    value = f"{_number(verdict['value'])}{verdict['unit']}"
    if verdict["low"] is None:
        return value
    return f"{value} ({_number(verdict['low'])}–{_number(verdict['high'])})"


def _bound(verdict: Document) -> str:
    return f"{'≥' if verdict['at_least'] else '≤'} {verdict['bound']:g}{verdict['unit']}"


def _mark(verdict: Document) -> str:
    return {True: "pass", False: "MISSED", None: "not judged"}[verdict["passed"]]


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}"


def _rate(row: Document) -> str:
    rates = [turn["rate"] for turn in row["turns"]]
    return f"{_whole(row['rate'])} ({_whole(min(rates))}–{_whole(max(rates))})"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _at(row: Document) -> str:
    return "" if row["at"] is None else f"{row['at']:g}"
