"""Servers to compare with, one a file, each started with `python -m bench.peers.<name> ... PORT`."""
