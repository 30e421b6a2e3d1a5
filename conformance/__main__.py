"""`python -m conformance matrix|models|precision|fuzz`, as run by `make conformance` and `make fuzz-export`.

Each command measures one part of docs/conformance.md; --write-docs writes it there.
"""

import argparse
import sys
from pathlib import Path

from conformance import architectures, documents, fuzz, matrix, precision_costs
from conformance.kinds import kinds


def main(argv: list[str]) -> int:
    """Run a command. Returns 0 if nothing was silently wrong, crashed or timed out."""
    parser = argparse.ArgumentParser("python -m conformance", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes (default: %(default)s)")
    parser.add_argument("--write-docs", action="store_true", help=f"write the results into {documents.PAGE.name}")
    commands = parser.add_subparsers(required=True, dest="command")
    kind = commands.add_parser("matrix", help="kinds of modules, with unroll.export and with torch.onnx.export")
    kind.add_argument("--only", action="append", metavar="KIND", help="one row; may be repeated")
    commands.add_parser("models", help="the models of examples/architectures")
    commands.add_parser("precision", help="cost and gain of float16 and int8 on this CPU")
    random = commands.add_parser("fuzz", help="export random models")
    random.add_argument("--trees", type=int, default=2000, help="number of trees (default: %(default)s)")
    random.add_argument("--folder", type=Path, default=Path(".fuzz"), help="results folder (default: %(default)s)")
    random.add_argument("--tree", help="one tree, as printed in the output")
    options = parser.parse_args(argv)
    return {"matrix": _matrix, "models": _models, "precision": _precision, "fuzz": _fuzz}[options.command](options)


def _matrix(options: argparse.Namespace) -> int:
    rows = matrix.measure(options.only or [kind.name for kind in kinds()], options.workers)
    for row in rows:
        print(f"{row.name}: {row.exported.outcome} {row.exported.says}")
        print(f"    dynamo=True: {row.dynamo.outcome} {row.dynamo.says or row.dynamo.once}")
        print(f"    dynamo=False: {row.torchscript.outcome} {row.torchscript.says or row.torchscript.once}")
    if options.write_docs:
        documents.replace("kinds", documents.kinds(rows, "make conformance"))
    return 1 if any(row.exported.outcome in fuzz.BAD for row in rows) else 0


def _models(options: argparse.Namespace) -> int:
    found = [architectures.measure(architecture) for architecture in architectures.ARCHITECTURES]
    lines = documents.models(found, "make conformance")
    print(*lines, sep="\n")
    if options.write_docs:
        documents.replace("models", lines)
    return 0


def _precision(options: argparse.Namespace) -> int:
    lines = documents.precision(list(precision_costs.measure()), "make conformance")
    print(*lines, sep="\n")
    if options.write_docs:
        documents.replace("precision", lines)
    return 0


def _fuzz(options: argparse.Namespace) -> int:
    if options.tree:
        verdicts = [fuzz.judge(fuzz.parse(options.tree))]
        print(verdicts[0])
    else:
        verdicts = fuzz.run(options.trees, options.folder, options.workers)
        print(*fuzz.counts(verdicts), sep="\n")
    if options.write_docs:
        lines = [documents.circumstances("make fuzz-export"), "", "```text", *fuzz.counts(verdicts), "```"]
        documents.replace("random", lines)
    return 1 if any(verdict.outcome in fuzz.BAD for verdict in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
