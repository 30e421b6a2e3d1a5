"""The public function `unroll.export`."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from unroll.bundle import Precision
from unroll.bundle.signature import KeyUnusable, Signer
from unroll.export.errors import ExportError
from unroll.export.options import ExportOptions, Progress
from unroll.export.pipeline import Pipeline
from unroll.export.report import Report
from unroll.export.signature.arguments import DeclaredArguments


def export(
    module: nn.Module | ExportedProgram,
    example_inputs: dict[str, Any],
    *,
    name: str,
    version: str = "1",
    repository: Path | str,
    replace: bool = False,
    batch_first: bool = True,
    time_last: bool = False,
    output_names: list[str] | None = None,
    precision: Precision = "float32",
    max_error: float | None = None,
    static: Collection[str] = (),
    state: Mapping[str, str] = MappingProxyType({}),
    step: bool = False,
    allow_nan: Collection[str] = (),
    rates: Mapping[str, float] = MappingProxyType({}),
    sign: Path | str | None = None,
    progress: Progress = lambda stage: None,
) -> Report:
    """Write `module` as the bundle `<repository>/<name>/<version>`, proven equal to PyTorch.

    Args:
        module: a trained nn.Module, TorchScript, or a program of torch.export. It is not changed.
        example_inputs: by the names of forward's arguments: tensors (batch, time, ...), or (time, batch, ...) without
            `batch_first`. Parity is proven on inputs of their scale. An initial state that is given here becomes the
            bundle's initial state; it must be the same in every row.
        name: the model's name in the repository.
        version: up to 18 digits, without a leading zero.
        repository: the folder that holds the bundles.
        replace: overwrite an existing bundle.
        batch_first: forward takes (batch, time, ...), otherwise (time, batch, ...).
        time_last: forward takes (batch, ..., time), as convolutions do. The bundle takes (batch, time, ...).
        output_names: names for the outputs, in the order in which forward returns them.
        precision: of the graph: float16 for a GPU, int8 for the CPU. Inputs, outputs and state stay float32.
        max_error: the largest absolute difference from PyTorch in float64 that an output may have.
        static: the arguments without time, (batch, ...), which are given once when a sequence begins.
        state: the arguments that forward returns for its next call, as a cache is, each with the name of that output:
            `y1` is the second of a tuple. Their example, the same in every row, is what a sequence starts from.
        step: forward makes one time step: its inputs are (batch, ...), and `state` names the states that it takes and
            returns, of any shape; one that forward can do without (`state=None`) may be left out of the example.
        allow_nan: inputs of float32 that may hold NaN, for a value that is missing: forward chooses what to compute
            then, as with torch.where(torch.isnan(x), ...). It is tried with NaN at random places.
        rates: values per second of inputs whose time steps are consecutive pieces of a signal, such as sound. No number
            depends on them: `unroll stream` checks recordings by them, and the page listens to a microphone at them.
        sign: file of a private key, as `unroll keys pair` makes one; the bundle is signed with it.
        progress: called with a line of text at the beginning of each stage.

    Returns:
        The path of the bundle, its manifest, and notes on what differs from the module.

    Raises:
        ExportError: if the model cannot be exported faithfully; `code` says why, the message what to change. Nothing
            is written then.
    """
    arguments = DeclaredArguments(frozenset(static), state, batch_first)
    options = ExportOptions(
        name=name,
        version=version,
        repository=Path(repository),
        replace=replace,
        arguments=arguments,
        step=step,
        time_last=time_last,
        output_names=output_names,
        precision=precision,
        max_error=max_error,
        signer=_signer(sign),
        rates=dict(rates),
        allow_nan=frozenset(allow_nan),
    )
    return Pipeline(options, progress).run(module, example_inputs)


def _signer(path: Path | str | None) -> Signer | None:
    try:
        return None if path is None else Signer.read(Path(path))
    except KeyUnusable as error:
        raise ExportError("bundle", str(error)) from None
