"""docs/gpu.md: replaces its figures by those of a results file; the text around them is written by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import report

Results = Mapping[str, Any]


def write(results: Results, docs: Path) -> None:
    report.replace_figures(docs / "gpu.md", [*figures(results), ""])
    (docs / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


def figures(results: Results) -> list[str]:
    lines = _circumstances(results)
    for name, part in _PARTS.items():
        found = results.get(name, {"failed": "not run"})
        what = [f"- {name}: not measured ({found['failed']})"] if "failed" in found else part(results)
        lines += ["", *what]
    return lines


def _circumstances(results: Results) -> list[str]:
    about, limits = results["about"], results["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"{about['date']}, `{' '.join(about['command'])}`, medians of {results['turns']} turns: {about['gpu']} "
        f"(name, driver, memory); {about['cpu']}, {len(about['cores'])} cores; Python {about['python']}, {versions}.",
        "",
        f"Measured in the same run: copies {limits['copy'] / 1e12:.2f} TB/s, float32 products "
        f"{limits['float32'] / 1e12:.1f} TFLOP/s, with TF32 {limits['tf32'] / 1e12:.0f} TFLOP/s.",
    ]


def _steps(results: Results) -> list[str]:
    lines = ["### A step", "", "Microseconds for one time step of every row.", ""]
    head = ["model", "rows", "precision", "device", "M steps/s", "with transfers", "from arrays to arrays"]
    head += ["onnxruntime's layers", "PyTorch", "PyTorch / device", "floor"]
    rows = [
        [
            each["title"],
            each["rows"],
            each["precision"],
            f"{each['device']:.1f}",
            f"{each['steps_per_second'] / 1e6:.2f}",
            f"{each['graph']:.1f}",
            f"{each['call']:.1f}",
            f"{each['onnxruntime']:.1f}",
            f"{each['torch']:.1f}",
            f"{each['torch'] / each['device']:.2f}",
            f"{each['floor']:.1f}",
        ]
        for each in results["steps"]
    ]
    return lines + _table(head, rows, left=3)


def _sequences(results: Results) -> list[str]:
    head = ["32 sequences of 512 steps", "precision", "Unroll, ms", "PyTorch, ms", "PyTorch / Unroll"]
    rows = [
        [
            each["title"],
            each["precision"],
            f"{each['ours'] * 1e3:.2f}",
            f"{each['torch'] * 1e3:.2f}",
            f"{each['torch'] / each['ours']:.2f}",
        ]
        for each in results["sequences"]
    ]
    return ["### Whole sequences, from host memory to host memory", "", *_table(head, rows, left=2)]


def _resident(results: Results) -> list[str]:
    rows = [[f"{int(sessions):,}", f"{micro:.1f}"] for sessions, micro in results["resident"].items()]
    return ["### Sessions on the device", "", *_table(["LSTM 2×256, sessions", "call of 256 rows, µs"], rows, left=0)]


def _proof(results: Results) -> list[str]:
    head = ["LSTM 2×256", "y, from PyTorch float64", "state_out", "between buckets"]
    rows = [
        [
            each["precision"],
            f"{each['parity']['y']:.2g}",
            f"{each['parity']['state_out']:.2g}",
            f"{each['stability']:.2g}",
        ]
        for each in results["proof"]
    ]
    return [
        "### Differences",
        "",
        "Largest absolute differences over the golden vectors.",
        "",
        *_table(head, rows, left=1),
    ]


def _streams(results: Results) -> list[str]:
    head = ["model", "connections", "sessions a frame", "steps/s", "of the engine's", "p50 ms", "p99 ms"]
    rows = [
        [
            each["title"],
            each["connections"],
            each["entries"],
            f"{each['steps']:,.0f}",
            f"{each['steps'] / each['engine']:.2f}",
            f"{each['p50']:.2f}",
            f"{each['p99']:.2f}",
        ]
        for each in results["streams"]
    ]
    return ["### Over WebSockets", "", *_table(head, rows, left=1)]


_PARTS = {
    "steps": _steps,
    "sequences": _sequences,
    "resident": _resident,
    "proof": _proof,
    "streams": _streams,
}


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int) -> list[str]:
    """left: number of text columns."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, rule, *rows)]
