"""Command line of every server here: `PORT FOLDER NAME=MODEL ... [--strategy=WORD]`."""

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arguments:
    """The arguments: an empty folder for the server's files, model.onnx by name, and Triton's strategy."""

    port: int
    folder: Path
    models: dict[str, Path]
    strategy: str


def arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--strategy", default="")
    given = parser.parse_args()
    models = {name: Path(path) for name, _, path in (word.partition("=") for word in given.models)}
    return Arguments(given.port, given.folder, models, given.strategy)
