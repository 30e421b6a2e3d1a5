"""`unroll export`: a PyTorch model becomes a bundle that is proven equal to it."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from unroll.bundle import Precision
from unroll.export.loading.input_specs import InputSpec, StateSpec

_USAGE = """unroll export MODULE:FACTORY [--weights FILE] --input NAME:DTYPE:SHAPE ... --name NAME --repository DIR
       unroll export FILE.py:FACTORY [--weights FILE] --input NAME:DTYPE:SHAPE ... --name NAME --repository DIR
       unroll export SCRIPT.pt --input NAME:DTYPE:SHAPE ... --repository DIR [--name NAME]
       unroll export CHECKPOINT --repository DIR [--name NAME]"""


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 if the bundle was written, 1 for a model that cannot be exported, 2 for wrong arguments. Unless it returns 0,
        it has written nothing.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    from unroll.export.command import run  # imports torch, which takes seconds: wrong arguments are answered before

    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unroll export", usage=_USAGE, description=__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="MODULE:FACTORY or FILE.py:FACTORY (a class, or a function that returns the model, in your own code), "
        "a TorchScript file, or the stem of a checkpoint NAME.safetensors + NAME.json",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights: safetensors, or a file of torch.save")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="export a model whose weights are random numbers, for a trial; without this it is refused",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        type=InputSpec.parse,
        metavar="NAME:DTYPE:SHAPE",
        help="an argument of forward, (batch, time, *SHAPE); SHAPE is one time step: 64, 8x3, or empty for a token id",
    )
    parser.add_argument(
        "--static",
        action="append",
        default=[],
        type=InputSpec.parse,
        metavar="NAME:DTYPE:SHAPE",
        help="an argument of forward without time, (batch, *SHAPE), given once when a sequence begins",
    )
    parser.add_argument(
        "--state",
        action="append",
        default=[],
        type=StateSpec.parse,
        metavar="NAME:DTYPE:SHAPE=OUTPUT",
        help="an argument of forward, (batch, *SHAPE), that starts as zeros and is this output of the call before; "
        "not needed for the state of a recurrent layer",
    )
    parser.add_argument("--name", help="the model's name in the repository (default: the file name of MODEL)")
    parser.add_argument("--version", default="1", help="version, in digits (default: 1)")
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="folder that holds the bundles")
    parser.add_argument("--replace", action="store_true", help="overwrite an existing bundle")
    parser.add_argument("--time-first", action="store_true", help="forward takes (time, batch, ...)")
    parser.add_argument("--outputs", metavar="A,B", help="names of the outputs, in the order forward returns them")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="precision of the graph: float16 for a GPU, int8 for the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--max-error",
        type=_positive,
        metavar="E",
        help="refuse a model of which an output differs from PyTorch in float64 by more than E",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("use a number above 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
