"""What `unroll export` does once its arguments are known. `__main__.py` parses them, without torch."""

import argparse
import sys
from pathlib import Path
from typing import Any

from unroll.export.errors import ExportError
from unroll.export.exporter import export
from unroll.export.loading import programs
from unroll.export.loading.checkpoints import from_checkpoint
from unroll.export.loading.example_inputs import examples
from unroll.export.loading.user_code import check_not_random, from_factory, importable
from unroll.export.loading.weight_files import check_script
from unroll.export.report import Report

#: Names of files that are no stem of a checkpoint, even where there is no such file.
_PROGRAMS = {".pt", ".pth", ".ts", ".jit", ".pt2", ".ckpt", ".bin"}


def run(options: argparse.Namespace) -> int:
    """Export, and print the report.

    Returns:
        0 if the bundle was written, 1 for a model that cannot be exported.
    """
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
