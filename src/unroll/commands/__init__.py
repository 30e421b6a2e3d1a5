"""The commands. Each is a dataclass of its options, and its `run` does the work.

The modules here import nothing heavy at the top level, so that help and usage errors are fast; `run` imports the
command's dependencies.
"""
