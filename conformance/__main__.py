"""`python -m conformance fuzz`: the long runs behind `make fuzz-export`."""

import argparse
import sys
from pathlib import Path

from conformance import fuzz


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    if options.tree:
        verdict = fuzz.judge(fuzz.parse(options.tree))
        print(verdict)
        return 1 if verdict.outcome in fuzz.BAD else 0
    verdicts = fuzz.run(options.trees, options.folder, options.workers)
    print(*fuzz.counts(verdicts), sep="\n")
    return 1 if any(verdict.outcome in fuzz.BAD for verdict in verdicts) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m conformance", description=__doc__)
    commands = parser.add_subparsers(required=True)
    fuzzing = commands.add_parser("fuzz", help="random models through export")
    fuzzing.add_argument("--trees", type=int, default=2000)
    fuzzing.add_argument("--workers", type=int, default=2)
    fuzzing.add_argument("--folder", type=Path, default=Path(".fuzz"), help="where what was found is kept")
    fuzzing.add_argument("--tree", help="one tree, as a line of the output shows it")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
