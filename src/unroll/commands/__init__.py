"""The commands: each is a dataclass of its options whose `run` does the work.

A module here imports nothing heavy at its top, so that help and wrong arguments are answered at once; `run` imports
what the command needs.
"""
