"""Runs `unroll export` with parsed options."""

import json
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unroll.export.errors import ExportError
from unroll.export.exporter import export
from unroll.export.loading import programs
from unroll.export.loading.checkpoints import from_checkpoint
from unroll.export.loading.example_inputs import examples, step_examples
from unroll.export.loading.input_specs import InputSpec, StateSpec, factory_argument, input_rate
from unroll.export.loading.user_code import check_not_random, from_factory, importable, saved_arguments
from unroll.export.loading.weight_files import check_script
from unroll.export.report import Report
from unroll.export.stages import stages

if TYPE_CHECKING:
    from unroll.commands.export import Export

#: Suffixes that are never part of a checkpoint's stem, even if the file does not exist.
_PROGRAMS = {".pt", ".pth", ".ts", ".jit", ".pt2", ".ckpt", ".bin"}


def run(options: "Export") -> int:
    """Export, and print the report.

    Returns:
        0 if the bundle was written, 1 for a model that cannot be exported.
    """
    try:
        with importable(options.model):
            report = _export(options)
    except ExportError as error:
        print(f"unroll export: {error.code}: {error}", file=sys.stderr)
        if options.verbose and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return 1
    if options.json:
        document = {"path": str(report.path), "notes": report.notes, "manifest": asdict(report.manifest)}
        print(json.dumps(document, indent=2))
    else:
        print(f"\n{report}")
    return 0


def _export(options: "Export") -> Report:
    module, example, notes = _load(options)
    if options.time_last:
        names = {InputSpec.parse(word).name for word in options.input or ()}
        example = {name: tensor.movedim(1, -1) if name in names else tensor for name, tensor in example.items()}
    with stages() as progress:
        report = export(
            module,
            example,
            name=options.name or Path(options.model).name.partition(".")[0],
            version=options.version,
            repository=options.repository,
            replace=options.replace,
            batch_first=not options.time_first,
            time_last=options.time_last,
            precision=options.precision,
            max_error=options.max_error,
            output_names=options.outputs.split(",") if options.outputs else None,
            static=[InputSpec.parse(word).name for word in options.static or ()],
            state={spec.name: spec.output for spec in map(StateSpec.parse, options.state or ())},
            step=options.step,
            sign=options.sign,
            allow_nan=options.allow_nan or (),
            rates=dict(map(input_rate, options.input_rate or ())),
            progress=progress,
        )
    return replace(report, notes=(*notes, *report.notes)) if notes else report


def _load(options: "Export") -> tuple[Any, dict[str, Any], list[str]]:
    """Load the module that MODEL names; returns it with example inputs and notes on how it was made."""
    inputs, static = ([InputSpec.parse(word) for word in words or ()] for words in (options.input, options.static))
    described = inputs, static, [StateSpec.parse(word) for word in options.state or ()]
    describe = step_examples if options.step else examples
    if ":" in options.model:
        example = describe(*described)
        module, notes = _make(options)
        return module, example, notes
    path = Path(options.model)
    if path.suffix == ".py":
        raise ExportError("checkpoint", f"{path}: name the class or function to call, as {path}:FACTORY")
    if options.weights or options.arg:
        raise ExportError("checkpoint", "--weights and --arg are for MODULE:FACTORY: name the class or function")
    is_checkpoint = path.suffix in {"", ".safetensors"} and path.with_suffix(".json").is_file()
    if not is_checkpoint and (path.exists() or path.suffix in _PROGRAMS):
        check_script(path)
        return programs.load(path), describe(*described), []
    if any(described) or options.step:
        raise ExportError(
            "checkpoint",
            "--input, --static, --state and --step are for other models; a checkpoint describes its inputs itself",
        )
    return *from_checkpoint(options.model), []


def _make(options: "Export") -> tuple[Any, list[str]]:
    """Call FACTORY and load the weights; returns the module and notes."""
    given = dict(map(factory_argument, options.arg or ()))
    saved = saved_arguments(options.model, options.weights, given) if options.weights else {}
    arguments = saved | given
    notes: list[str] = []
    if saved:
        words = ", ".join(f"{name}={value!r}" for name, value in saved.items())
        notes.append(f"made with {words}: hyper_parameters in {options.weights}")
    module = from_factory(options.model, options.weights, arguments, say=notes.append)
    if not options.random_weights:
        check_not_random(options.model, options.weights, module, arguments)
    return module, notes
