"""One row of docs/packages.md: a module of a package, and how it is exported."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]

#: The package's own call for one step after another: from the module and (1, time, ...) inputs to (time, ...) outputs.
Streaming = Callable[[Any, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        package: its requirement, as for pip.
        module: its name on the page.
        build: makes it. The export process and the comparing one get the same weights.
        inputs: as for `--input`.
        options: more arguments of `unroll export`.
        trained: the package's wheel holds its weights.
        own: the package's own streaming call, or None if it has none.
        alone: what the package requires is left out.
        needs: what the module needs of that.
    """

    package: str
    module: str
    build: Build
    inputs: tuple[str, ...]
    options: tuple[str, ...] = ()
    trained: bool = False
    own: Streaming | None = None
    alone: bool = False
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the function that makes it."""
        return self.build.__name__

    @property
    def step(self) -> bool:
        """Its forward makes one step."""
        return "--step" in self.options


ENTRIES: dict[str, Entry] = {}


def entry(package: str, module: str, *inputs: str, **more: Any) -> Callable[[Build], Build]:
    """Register the function below as what makes the module."""

    def register(build: Build) -> Build:
        @wraps(build)
        def seeded() -> nn.Module:
            torch.manual_seed(1)
            return build().eval()

        ENTRIES[build.__name__] = Entry(package, module, seeded, inputs, **more)
        return seeded

    return register


def bare(*packages: str) -> None:
    """Import these without what their __init__ does, which may import more than the module needs."""
    for name in packages:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            sys.modules[name] = importlib.util.module_from_spec(spec)
