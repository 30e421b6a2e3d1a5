"""The options of an export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from unroll.bundle import BundleError, Precision
from unroll.bundle.manifest import check_name
from unroll.bundle.signature import Signer
from unroll.export.errors import ExportError
from unroll.export.signature.arguments import DeclaredArguments
from unroll.export.signature.samples import missing

#: Called with a line of text at the start of each stage.
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of one export, as documented in `unroll.export`."""

    name: str
    version: str
    repository: Path
    replace: bool
    arguments: DeclaredArguments
    step: bool
    time_last: bool
    output_names: list[str] | None
    precision: Precision
    max_error: float | None
    signer: Signer | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    allow_nan: frozenset[str] = frozenset()

    def with_missing(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Put NaN at random places of the inputs that allow it. Raises ExportError(input)."""
        for name in self.allow_nan:
            value = example.get(name)
            if name in self.arguments.static or name in self.arguments.state or not isinstance(value, Tensor):
                raise ExportError("input", f"NaN is allowed in {name!r}, which is not an input with time")
            if value.dtype != torch.float32:
                raise ExportError("input", f"NaN is allowed in {name!r}, which is {value.dtype} and not float32")
        return {name: missing(value) if name in self.allow_nan else value for name, value in example.items()}

    def check_rates(self, example: Mapping[str, object]) -> None:
        """Raise ExportError(input) for an invalid rate, or a rate without an input that has time."""
        for name, rate in self.rates.items():
            if name not in example or name in self.arguments.static or name in self.arguments.state:
                raise ExportError("input", f"a rate is given for {name!r}, which is not an input with time")
            if not 0 < rate < inf:
                raise ExportError("input", f"the rate of {name!r} is {rate}: give a finite number above 0")

    def check_target(self) -> None:
        """Raise ExportError(bundle | input) if the target or the options are invalid."""
        try:
            check_name(self.name, self.version)
        except BundleError as error:
            raise ExportError("bundle", error.message) from None
        state: Any = self.arguments.state
        continued = state.values() if isinstance(state, Mapping) else [None]
        names = [*state, *continued, *self.rates, *(self.output_names or ())]
        numbers = [*self.rates.values(), 0.0 if self.max_error is None else self.max_error]
        if not all(isinstance(name, str) for name in names) or not all(isinstance(n, (int, float)) for n in numbers):
            raise ExportError(
                "input", "names of inputs and outputs are strings, as in state={'h': 'y1'}; rates and max_error numbers"
            )
        if self.precision not in get_args(Precision):
            raise ExportError("precision", f"{self.precision!r} is none of {', '.join(get_args(Precision))}")
        if self.time_last and not self.arguments.batch_first:
            raise ExportError("input", "time is either first or last in the inputs: give only one of the two options")
        if self.step and (self.time_last or not self.arguments.batch_first):
            raise ExportError("input", "the inputs of a single step have no time axis: omit its position")
        path = self.repository / self.name / self.version
        if path.exists() and not self.replace:
            free = 1 + max(int(each.name) for each in path.parent.iterdir() if each.name.isdecimal())
            how = f"choose another version (--version {free}), or overwrite it (--replace)"
            raise ExportError("bundle", f"{path} exists; {how}")
