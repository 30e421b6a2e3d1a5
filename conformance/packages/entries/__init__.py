"""All rows. A package is imported only where its module is made, in an environment that has it."""

from conformance.packages.entries import agents, cells, sequences, spiking, steps
from conformance.packages.entry import ENTRIES

__all__ = ["ENTRIES", "agents", "cells", "sequences", "spiking", "steps"]
