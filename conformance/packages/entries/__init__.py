"""All entries. A package is imported only when its module is built, in an environment that has it."""

import importlib
import pkgutil

from conformance.packages.entry import ENTRIES

__all__ = ["ENTRIES"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
