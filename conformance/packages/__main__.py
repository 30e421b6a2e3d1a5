"""`python -m conformance.packages [ENTRY ...]`, as run by `make packages`; --write-docs writes docs/packages.md.

With ENTRY, only the rows of these entries change.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter

from conformance import documents
from conformance.packages import environments
from conformance.packages.entries import ENTRIES
from conformance.packages.entry import Entry
from conformance.packages.trial import Result

_PAGE = environments.ROOT / "docs" / "packages.md"
_SECONDS = 1800


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 unless an answer was wrong."""
    parser = argparse.ArgumentParser(f"python -m {__package__}", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help=f"write the results into {_PAGE.name}")
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help="; ".join(ENTRIES))
    options = parser.parse_args(argv)
    if unknown := set(options.entries) - ENTRIES.keys():
        parser.error(f"no entry {', '.join(sorted(unknown))}; --help has all")
    results = {}
    for name in options.entries or ENTRIES:
        results[name] = result = _measured(ENTRIES[name])
        print(f"{name}: {result.outcome} {result.says}", flush=True)
        if options.write_docs:
            documents.replace("packages", block({name: result}, _PAGE.read_text()), _PAGE)
    return 1 if any(result.outcome == "wrong" for result in results.values()) else 0


def _measured(entry: Entry) -> Result:
    try:
        python = environments.python(entry.package, entry.alone, entry.needs)
    except environments.NotInstalled as error:
        return Result("", "not installed", str(error).splitlines()[-1])
    command = [str(python), "-m", "conformance.packages.trial", entry.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=environments.ROOT, timeout=_SECONDS)
    if done.returncode:
        return Result("", "failed", (done.stderr.strip().splitlines() or [""])[-1])
    return Result(**json.loads(done.stdout))


def block(results: dict[str, Result], page: str) -> list[str]:
    """The block of the page; entries without a result keep their rows of `page`."""
    before = [line for line in page.splitlines() if line.startswith("| ")]
    rows = []
    for name, entry in ENTRIES.items():
        if name in results:
            rows.append(_row(entry, results[name]))
            continue
        start, module = f"| {entry.package} ", f" | {entry.module} | "
        kept = [line[2:-2].split(" | ") for line in before if line.startswith(start) and module in line]
        rows += [[cell.replace("\\|", "|") for cell in cells] for cells in kept]
    counts = Counter(re.split("[:,]", row[3])[0] for row in rows)
    ratios = [float(row[7]) for row in rows if row[7]]
    packages = len({row[0].split()[0] for row in rows})
    head = ["package", "module", "weights", "result", "export, s", "served step, µs", "its own step, µs", "ratio"]
    head += ["error", "error of its own steps", "steps"]
    return [
        documents.circumstances("make packages"),
        "",
        f"{len(rows)} modules of {packages} packages: {', '.join(f'{n} {what}' for what, n in counts.items())}. "
        f"In {sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}, the served step costs at most the package's own.",
        "",
        *documents.table(head, rows),
        "",
    ]


def _row(entry: Entry, result: Result) -> list[str]:
    reason = re.sub(r"\.tools/packages/\S+?/site-packages/", "", result.says)
    says = f"{result.outcome}: {reason}" if reason else result.outcome
    if result.decisions and not reason:
        says += f", the same {result.decisions:,} decisions"
    cost = [""] * 3
    if result.served_us and result.package_us:
        cost = [f"{result.served_us:.0f}", f"{result.package_us:.0f}", f"{result.served_us / result.package_us:.2f}"]
    errors = ["" if error is None else f"{error:.1e}" for error in (result.error, result.own)]
    weights = "of the wheel" if entry.trained else "random"
    return [
        f"{entry.package} {result.version}",
        entry.module,
        weights,
        says,
        f"{result.seconds:.0f}",
        *cost,
        *errors,
        str(result.steps or ""),
    ]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
