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
    """Export `module` as the bundle `<repository>/<name>/<version>`, and prove that it equals PyTorch.

    Args:
        module: a trained nn.Module, TorchScript, or a program of torch.export. It is not modified.
        example_inputs: forward's arguments by name: tensors (batch, time, ...), or (time, batch, ...) without
            `batch_first`. Parity is proven on inputs of the same scale. An initial state given here becomes the
            bundle's initial state; its rows must be equal.
        name: the model's name in the repository.
        version: up to 18 digits, without a leading zero.
        repository: the folder that holds the bundles.
        replace: overwrite an existing bundle.
        batch_first: forward takes (batch, time, ...), otherwise (time, batch, ...).
        time_last: forward takes (batch, ..., time), as convolutions do. The bundle takes (batch, time, ...).
        output_names: names for the outputs, in forward's order.
        precision: precision of the graph: float16 for a GPU, int8 for the CPU. Inputs, outputs and state stay float32.
        max_error: the largest allowed absolute difference of an output from PyTorch in float64.
        static: arguments without time, (batch, ...), which a client gives once, at the start of a sequence.
        state: arguments that forward returns for its next call, such as a cache, each with the name of that output;
            `y1` is the second item of a tuple. Their example is a sequence's initial state; its rows must be equal.
        step: forward computes one time step. Its inputs are (batch, ...), and `state` names the states that it takes
            and returns, of any shape. A state with the default None may be omitted from the example.
        allow_nan: float32 inputs that use NaN for missing values. forward must handle it, for example with
            torch.where(torch.isnan(x), ...); export tries it with NaN at random places.
        rates: values per second, for inputs whose time steps are consecutive pieces of a signal such as sound. They do
            not affect the model: `unroll stream` checks recordings against them, and the page records from a microphone
            at this rate.
        sign: a private key file from `unroll keys pair`, to sign the bundle with.
        progress: called with a line of text at the start of each stage.

    Returns:
        The path of the bundle, its manifest, and notes on differences from the module.

    Raises:
        ExportError: if the model cannot be exported faithfully. `code` says why, the message says what to change.
            Nothing is written in this case.
    """
    arguments = DeclaredArguments(frozenset(static), state, batch_first)
    options = ExportOptions(
        name=name,
        version=str(version),
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
