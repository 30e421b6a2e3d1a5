"""One row of docs/packages.md: a module of a package, and how to export it."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]

#: The package's own step-by-step call: from the module and inputs (1, time, ...) to outputs (time, ...).
Streaming = Callable[[Any, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Real:
    """Real data, and what the package decides with it.

    Attributes:
        inputs: three sequences (3, time, ...) by input.
        own: the decisions of the package with its own model.
        decide: from the output (3, time, ...) of the served model to the decisions of the package with it.
    """

    inputs: dict[str, Tensor]
    own: list[Any]
    decide: Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        package: the package as a pip requirement.
        module: the module's name on the page.
        build: makes the module, with the same weights in every process.
        inputs: values of `--input`.
        options: further arguments of `unroll export`.
        trained: the package's wheel contains the weights.
        own: the package's own streaming call, if any.
        alone: install the package without its dependencies.
        needs: the dependencies that the module needs nevertheless.
        real: makes real data for the module; without it, the data are random.
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
    real: Callable[[], Real] | None = None

    @property
    def name(self) -> str:
        """The name of the function that makes the module."""
        return self.build.__name__

    @property
    def step(self) -> bool:
        """Does its forward compute one step?"""
        return "--step" in self.options


ENTRIES: dict[str, Entry] = {}


def entry(package: str, module: str, *inputs: str, **more: Any) -> Callable[[Build], Build]:
    """Register the decorated function as the builder of a module."""

    def register(build: Build) -> Build:
        @wraps(build)
        def seeded() -> nn.Module:
            torch.manual_seed(1)
            return build().eval()

        ENTRIES[build.__name__] = Entry(package, module, seeded, inputs, **more)
        return seeded

    return register


def bare(*packages: str) -> None:
    """Import packages without running their `__init__`, which may import more than the module needs."""
    for name in packages:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            sys.modules[name] = importlib.util.module_from_spec(spec)
