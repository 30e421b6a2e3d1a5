"""All entries. A package is imported only when its module is built, in an environment that has it."""

from conformance.packages.entries import (
    agents,
    cells,
    forecasting,
    language,
    sequences,
    speech,
    spiking,
    steps,
    trained,
)
from conformance.packages.entry import ENTRIES

__all__ = [
    "ENTRIES",
    "agents",
    "cells",
    "forecasting",
    "language",
    "sequences",
    "speech",
    "spiking",
    "steps",
    "trained",
]
