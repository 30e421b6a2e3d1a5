"""`unroll export`: a PyTorch model becomes a bundle that is proven equal to it."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from unroll.bundle import Precision
from unroll.export.errors import ExportError
from unroll.export.exporter import export
from unroll.export.loading import programs
from unroll.export.loading.checkpoints import from_checkpoint
from unroll.export.loading.example_inputs import InputSpec, StateSpec, examples
from unroll.export.loading.user_code import check_not_random, from_factory, importable
from unroll.export.loading.weight_files import check_script
from unroll.export.report import Report

_USAGE = """unroll export MODULE:FACTORY [--weights FILE] --input NAME:DTYPE:SHAPE ... --name NAME --repository DIR
       unroll export FILE.py:FACTORY [--weights FILE] --input NAME:DTYPE:SHAPE ... --name NAME --repository DIR
       unroll export SCRIPT.pt --input NAME:DTYPE:SHAPE ... --repository DIR [--name NAME]
       unroll export CHECKPOINT --repository DIR [--name NAME]"""

#: Names of files that are no stem of a checkpoint, even where there is no such file.
_PROGRAMS = {".pt", ".pth", ".ts", ".jit", ".pt2", ".ckpt", ".bin"}


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
    try:
        with importable(options.model):
            report = _export(options)
    except ExportError as error:
        print(f"unroll export: {error.code}: {error}", file=sys.stderr)
        return 1
    print(f"\n{report}")
    return 0


def _export(options: argparse.Namespace) -> Report:
    module, example = _load(options)
    return export(
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


def _load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The module that MODEL names, and example inputs for it."""
    described = options.input, options.static, options.state
    if ":" in options.model:
        example = examples(*described)
        module = from_factory(options.model, options.weights, say=print)
        if not options.random_weights:
            check_not_random(options.model, options.weights, module)
        return module, example
    path = Path(options.model)
    if path.suffix == ".py":
        raise ExportError("checkpoint", f"{path}: name the class or function to call, as {path}:FACTORY")
    is_checkpoint = path.suffix in {"", ".safetensors"} and path.with_suffix(".json").is_file()
    if not is_checkpoint and (path.is_file() or path.suffix in _PROGRAMS):
        check_script(path)
        return programs.load(path), examples(*described)
    if options.weights or any(described):
        raise ExportError(
            "checkpoint",
            "--weights, --input, --static and --state are for MODULE:FACTORY; a checkpoint describes both itself",
        )
    return from_checkpoint(options.model)


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
