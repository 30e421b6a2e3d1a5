"""All rows. A package is imported only where its module is made, in an environment that has it."""

from conformance.packages.entries import cells, forecasting, sequences, speech, steps
from conformance.packages.entry import ENTRIES

__all__ = ["ENTRIES", "cells", "forecasting", "sequences", "speech", "steps"]
