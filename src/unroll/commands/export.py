"""`unroll export`."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

from unroll.commands.options import Json, argument, flag, option, positive


def _spec(parse: str) -> Callable[[list[str] | None], None]:
    """A check that parses each word with the named function of `input_specs`."""

    def check(words: list[str] | None) -> None:
        if words:
            from unroll.export.loading import input_specs

            for word in words:
                attrgetter(parse)(input_specs)(word)

    return check


@dataclass(frozen=True)
class Export:
    """Convert a PyTorch model to a bundle, and prove that the two are equal.

      unroll export MODULE:FACTORY [--weights FILE] --input ... --name NAME --repository DIR
      unroll export FILE.py:FACTORY [--weights FILE] --input ... --name NAME --repository DIR
      unroll export SCRIPT.pt --input ... --repository DIR [--name NAME]
      unroll export CHECKPOINT --repository DIR [--name NAME]

    If the exit status is not 0, nothing was written.
    """

    model: Annotated[
        str,
        argument(
            "MODEL",
            "MODULE:FACTORY or FILE.py:FACTORY (a class, or a function that returns the model, in your own code), "
            "a TorchScript file, or the stem of a checkpoint NAME.safetensors + NAME.json",
        ),
    ]
    repository: Annotated[Path, option("--repository", "DIR", "folder that holds the bundles")]
    weights: Annotated[Path | None, option("--weights", "FILE", "weights: safetensors, or written by torch.save")] = (
        None
    )
    random_weights: Annotated[
        bool,
        flag(
            "--random-weights",
            "allow a model with random weights, for a trial; otherwise it is refused",
        ),
    ] = False
    arg: Annotated[
        list[str] | None,
        option(
            "--arg",
            "NAME=VALUE",
            "an argument of FACTORY, such as hidden=128 or cell=gru; arguments saved in a PyTorch Lightning checkpoint "
            "are the default",
            _spec("factory_argument"),
        ),
    ] = None
    input: Annotated[
        list[str] | None,
        option(
            "--input",
            "NAME:DTYPE:SHAPE",
            "an argument of forward, (batch, time, *SHAPE); SHAPE is one time step: 64, 8x3, or empty for a token id",
            _spec("InputSpec.parse"),
        ),
    ] = None
    allow_nan: Annotated[
        list[str] | None,
        option(
            "--allow-nan",
            "INPUT",
            "allow NaN for missing values in this float32 input; forward must handle it",
        ),
    ] = None
    input_rate: Annotated[
        list[str] | None,
        option(
            "--input-rate",
            "NAME=RATE",
            "values per second, for an input whose time steps are consecutive pieces of a signal such as sound; the "
            "page records from a microphone at this rate",
            _spec("input_rate"),
        ),
    ] = None
    static: Annotated[
        list[str] | None,
        option(
            "--static",
            "NAME:DTYPE:SHAPE",
            "an argument of forward without time, (batch, *SHAPE), given once at the start of a sequence",
            _spec("InputSpec.parse"),
        ),
    ] = None
    state: Annotated[
        list[str] | None,
        option(
            "--state",
            "NAME:DTYPE:SHAPE=OUTPUT",
            "an argument of forward, (batch, *SHAPE), that starts as zeros and then takes this output of the previous "
            "call; y1 is the second item of a tuple; B marks the batch axis if it is not the first, as in 2xBx64; a "
            "tuple has several shapes, as in 2xBx64,2xBx64; NAME=OUTPUT with --step if forward starts without it; not "
            "needed for states of recurrent layers",
            _spec("StateSpec.parse"),
        ),
    ] = None
    step: Annotated[
        bool,
        flag(
            "--step",
            "forward computes one time step: inputs are (batch, *SHAPE), states are given by --state or kept in the "
            "module",
        ),
    ] = False
    name: Annotated[
        str | None, option("--name", "NAME", "the model's name in the repository (default: the file name of MODEL)")
    ] = None
    version: Annotated[str, option("--version", "VERSION", "version: up to 18 digits, without a leading zero")] = "1"
    replace: Annotated[bool, flag("--replace", "overwrite an existing bundle")] = False
    time_first: Annotated[bool, flag("--time-first", "forward takes (time, batch, ...)")] = False
    time_last: Annotated[bool, flag("--time-last", "forward takes (batch, ..., time), as convolutions do")] = False
    outputs: Annotated[str | None, option("--outputs", "A,B", "names of the outputs, in forward's order")] = None
    precision: Annotated[
        Literal["float32", "float16", "int8"],
        option("--precision", "float32|float16|int8", "precision of the graph: float16 for a GPU, int8 for the CPU"),
    ] = "float32"
    max_error: Annotated[
        float | None,
        option(
            "--max-error",
            "E",
            "refuse the model if an output differs from PyTorch in float64 by more than E",
            positive,
        ),
    ] = None
    sign: Annotated[
        Path | None,
        option("--sign", "FILE", "sign the bundle with this private key, made by `unroll keys pair`"),
    ] = None
    verbose: Annotated[bool, flag("--verbose", "after a refusal, print PyTorch's full error")] = False
    json: Json = False

    def run(self) -> int:
        from unroll.export.command import run

        return run(self)
