"""`unroll export`: a checkpoint of ours, or any factory of a PyTorch module, becomes a bundle."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from unroll.bundle import Precision
from unroll.export.errors import ExportError
from unroll.export.exporter import export
from unroll.export.loading import programs
from unroll.export.loading.example_inputs import InputSpec, StateSpec, examples
from unroll.export.loading.user_code import from_checkpoint, from_factory

_USAGE = """unroll export CHECKPOINT --repository DIR [--name NAME]
       unroll export SCRIPT.pt --input NAME:DTYPE:SHAPE ... --repository DIR [--name NAME]
       unroll export MODULE:FACTORY [--weights FILE] --input NAME:DTYPE:SHAPE ... --name NAME --repository DIR"""


def main(argv: list[str]) -> int:
    """Returns 0 and leaves a bundle, or prints why not with its code, returns 1 or 2 and leaves nothing."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        given = options.input, options.static, options.state
        if ":" in options.model:
            example, module = examples(*given), from_factory(options.model, options.weights)
        elif Path(options.model).suffix in programs.SUFFIXES:
            module, example = programs.load(Path(options.model)), examples(*given)
        else:
            module, example = from_checkpoint(options.model, options.weights, any(given))
        report = export(
            module,
            example,
            name=options.name or Path(options.model).name.partition(".")[0],
            version=options.version,
            repository=options.repository,
            replace=options.replace,
            batch_first=not options.time_first,
            precision=options.precision,
            max_error=options.max_error,
            output_names=options.outputs.split(",") if options.outputs else None,
            static=[spec.name for spec in options.static],
            state={spec.input.name: spec.output for spec in options.state},
            progress=lambda stage: print(f"{stage} ...", flush=True),
        )
    except ExportError as error:
        print(f"unroll export: {error.code}: {error}", file=sys.stderr)
        return 1
    print(f"\n{report}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unroll export", usage=_USAGE, description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="stem of NAME.safetensors + NAME.json, a TorchScript file, or MODULE:FACTORY"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, or what torch.save wrote")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        type=InputSpec.parse,
        metavar="NAME:DTYPE:SHAPE",
        help="an argument of forward; SHAPE is what one time step holds: 64, 8x3, or empty for a token id",
    )
    parser.add_argument(
        "--static",
        action="append",
        default=[],
        type=InputSpec.parse,
        metavar="NAME:DTYPE:SHAPE",
        help="an argument of forward without time, (batch, *SHAPE): given once, when a sequence begins",
    )
    parser.add_argument(
        "--state",
        action="append",
        default=[],
        type=StateSpec.parse,
        metavar="NAME:DTYPE:SHAPE=OUTPUT",
        help="an argument of forward, (batch, *SHAPE) and zeros at first, that the next call gets from this output; "
        "what goes to a recurrent layer as its state is known without",
    )
    parser.add_argument("--name", help="the model's name in the repository (a checkpoint's own name if left out)")
    parser.add_argument("--version", default="1", help="digits (1)")
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR")
    parser.add_argument("--replace", action="store_true", help="write over an existing bundle")
    parser.add_argument("--time-first", action="store_true", help="forward takes (time, batch, ...)")
    parser.add_argument("--outputs", metavar="A,B", help="names of the outputs, in forward's order")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="float16 is for a GPU, int8 for the CPU (%(default)s)",
    )
    parser.add_argument(
        "--max-error",
        type=_positive,
        metavar="E",
        help="refuse a model of which an output is further from PyTorch float64",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("use a number above 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
