"""Writes the measured blocks of docs/conformance.md; the text around them is written by hand."""

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Literal

from conformance.architectures import Measured
from conformance.matrix import Exported, Row
from conformance.plain_export import Verdict
from conformance.precision_costs import Cost

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"

Block = Literal["kinds", "random", "models", "precision", "packages"]

_BITS = {True: "yes", False: "no", None: ""}

_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript")


def replace(block: Block, lines: Iterable[str], page: Path = PAGE) -> None:
    """Replace the lines between the markers of a block. Raises ValueError if the page has no such markers."""
    begin, end = f"<!-- {block}: begin -->", f"<!-- {block}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no place for {block}: {begin} … {end}")
    page.write_text("\n".join([before + begin, "", *lines, "", end + after]))


def circumstances(command: str) -> str:
    versions, distributions = [], importlib.metadata.packages_distributions()
    for name in _PACKAGES:
        for distribution in {name, *distributions.get(name, [])}:
            try:
                versions.append(f"{name} {importlib.metadata.version(distribution)}")
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return f"{date.today()}, `{command}`: {', '.join(versions)}."


def kinds(rows: Sequence[Row], command: str) -> list[str]:
    return [
        circumstances(command),
        "",
        *_totals(rows),
        "",
        "### Results of export",
        "",
        *table(
            ["", "exported", "streams", "largest error against float64", "chunks bit-equal", "nodes"],
            [[row.name, *_exported(row.exported)] for row in rows if row.exported.outcome in {"streams", "whole only"}],
        ),
        "",
        "### Reasons",
        "",
        *table(
            ["", "result", "reason"],
            [[row.name, row.exported.outcome, row.exported.says] for row in rows if row.exported.says],
        ),
        "",
        "### Comparison with `torch.onnx.export`",
        "",
        *table(
            ["", "Unroll", "dynamo=True", "dynamo=False", "state"],
            [
                [row.name, row.exported.outcome, _plain(row.dynamo), _plain(row.torchscript), _state(row)]
                for row in rows
            ],
        ),
    ]


def models(found: Sequence[Measured], command: str) -> list[str]:
    head = ["", "", "parameters", "streams", "largest error", "chunks bit-equal", "state, bytes", "model, bytes"]
    head += ["a step, µs of CPU", "export, s of CPU", "of which tracing"]
    rows = [
        [
            each.architecture.name,
            each.architecture.like,
            f"{each.parameters:,}",
            "yes" if each.streams else f"no: {each.why}",
            f"{each.error:.1e}",
            _BITS[each.bits],
            f"{each.state_bytes:,}",
            f"{each.model_bytes:,}",
            f"{each.step * 1e6:.0f}",
            f"{each.seconds:.1f}",
            f"{each.stages['tracing it into ONNX'] / each.seconds:.0%}",
        ]
        for each in found
    ]
    return [circumstances(command), "", *table(head, rows)]


def precision(found: Sequence[Cost], command: str) -> list[str]:
    head = ["", "precision", "largest error of an output", "stated bound", "of the state", "model, bytes"]
    head += ["1 row, µs of CPU", "32 rows, µs of CPU", "integer operators", "float operators"]
    rows = [
        [
            each.model,
            each.precision,
            *([each.refused] if each.refused else [f"{each.error:.1e}", f"{each.bound:.1e}", f"{each.state:.1e}"]),
            *(
                [""] * 6
                if each.refused
                else [f"{each.model_bytes:,}", f"{each.one * 1e6:.0f}", f"{each.many * 1e6:.0f}"]
            ),
            *([] if each.refused else [each.integers, each.floats]),
        ]
        for each in found
    ]
    return [circumstances(command), "", *table(head, [row + [""] * (len(head) - len(row)) for row in rows])]


def _totals(rows: Sequence[Row]) -> list[str]:
    ours = Counter(row.exported.outcome for row in rows)
    plain = {name: [getattr(row, name) for row in rows] for name in ("dynamo", "torchscript")}

    def count(name: str, outcome: str, once: bool = False) -> int:
        return sum(v.outcome == outcome and bool(v.once) == once for v in plain[name])

    body = [
        ["correct at every tested size", ours["streams"] + ours["whole only"], *(count(n, "works") for n in plain)],
        ["of these, streamable: the state is an input and an output", ours["streams"], *(
            sum(v.outcome == "works" and v.state for v in plain[n]) for n in plain
        )],
        ["correct in a fresh process, an error the second time", 0, *(count(n, "works", True) for n in plain)],
        ["error or refusal", ours["refused"] + ours["crashed"], *(count(n, "fails") for n in plain)],
        ["not comparable: the module's answer is not unique", 0, *(count(n, "cannot be compared") for n in plain)],
        ["**silently wrong**", ours["wrong"] + ours["wrong bits"], *(count(n, "silently wrong") for n in plain)],
    ]  # fmt: skip
    head = [f"of {len(rows)} kinds", "Unroll", "`torch.onnx.export`, dynamo=True", "dynamo=False"]
    return table(head, [[str(cell) for cell in row] for row in body])


def _exported(found: Exported) -> list[str]:
    error = "" if found.error is None else f"{found.error:.1e}"
    return ["yes", "yes" if found.outcome == "streams" else "no", error, _BITS[found.bits], found.nodes]


def _plain(verdict: Verdict) -> str:
    if verdict.outcome == "works":
        return f"works once; the second time {verdict.once}" if verdict.once else "works"
    return (
        f"**silently wrong** {verdict.says}"
        if verdict.outcome == "silently wrong"
        else f"{verdict.outcome}: {verdict.says}"
    )


def _state(row: Row) -> str:
    """How the plain graphs that work expose the state."""
    works = [verdict for verdict in (row.dynamo, row.torchscript) if verdict.outcome == "works"]
    if not works:
        return ""
    return "in and out" if any(verdict.state for verdict in works) else "none"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines]
