"""Ways to damage a bundle, each with part of the reason the server reports."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN, GRAPH, MANIFEST = "golden.safetensors", "model.onnx", "manifest.json"

Damage = Callable[[Path], object]


def describe(path: Path, **members: Any) -> None:
    """Change members of the manifest and update its description of the other files."""
    document = json.loads((path / MANIFEST).read_text())
    files = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in (GRAPH, GOLDEN)}
    (path / MANIFEST).write_text(json.dumps({**document, "files": files, **members}))


def member(**members: Any) -> Damage:
    return lambda path: describe(path, **members)


def vectors(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Change one tensor of the golden vectors."""

    def damage(path: Path) -> None:
        tensors = load_file(path / GOLDEN)
        save_file({**tensors, name: change(tensors[name]).copy(order="C")}, path / GOLDEN)
        describe(path)

    return damage


def _without_state(path: Path) -> None:
    tensors = load_file(path / GOLDEN)
    del tensors["state"]
    save_file(tensors, path / GOLDEN)
    describe(path)


def _graph(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        (path / GRAPH).write_bytes(change((path / GRAPH).read_bytes()))
        describe(path)

    return damage


def _instead_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return damage


def _dangling(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.symlink_to("nowhere")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a chunking that is a number": (vectors("chunking.0", lambda a: np.array(9)), "chunking is int64 of shape ()"),
    "a chunking of floats": (vectors("chunking.0", lambda a: a.astype("f4")), "chunking is float32"),
    "a chunking of no steps": (vectors("chunking.0", lambda a: a * 0), "do not add up"),
    "a chunking that is too long": (vectors("chunking.0", lambda a: a + 1), "do not add up"),
    "an input of another shape": (vectors("input.x", lambda a: a[..., :2]), "input.x is float32 of shape"),
    "an input without time": (vectors("input.x", lambda a: a[0, 0]), "golden.safetensors: "),
    "an input of doubles": (vectors("input.x", lambda a: a.astype("f8")), "input.x is float64"),
    "an output of floats": (vectors("output.y", lambda a: a.astype("f4")), "output.y is float32"),
    "a state of another size": (vectors("state", lambda a: a[:, 1:]), "state is float32"),
    "an output that is not finite": (vectors("output.y", lambda a: a * np.nan), "output.y holds"),
    "no sequences": (vectors("input.x", lambda a: a[:0]), "golden.safetensors: "),
    "vectors of another model": (vectors("output.y", lambda a: a + 1), "differs from PyTorch"),
    "no state": (_without_state, "'state'"),
    "vectors cut short": (lambda path: os.truncate(path / GOLDEN, 100), "SHA-256 differs"),
    "vectors that are none": (lambda path: ((path / GOLDEN).write_bytes(b"none"), describe(path)), GOLDEN),
    "no vectors": (lambda path: (path / GOLDEN).unlink(), GOLDEN),
    "vectors in a folder": (_instead_of(GOLDEN, Path.mkdir), "golden.safetensors is not a file"),
    "a graph cut short": (_graph(lambda content: content[:-100]), "model.onnx"),
    "an empty graph": (_graph(lambda content: b""), "model.onnx"),
    "a graph that is none": (_graph(lambda content: content[::-1]), "model.onnx"),
    "a graph in a pipe": (_instead_of(GRAPH, os.mkfifo), "model.onnx is not a file"),
    "a link to nothing": (_dangling, "No such file"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), MANIFEST),
    "an empty manifest": (lambda path: (path / MANIFEST).write_bytes(b""), "JSON"),
    "a manifest that is no text": (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe{}"), "JSON"),
    "a manifest that is a list": (lambda path: (path / MANIFEST).write_text("[]"), "anifest"),
    "a manifest a thousand lists deep": (lambda path: (path / MANIFEST).write_text("[" * 10**5), "JSON"),
    "inputs that are a number": (member(inputs=1), "inputs"),
    "files that are a list": (member(files=[]), "files"),
    "no files": (member(files={}), "model.onnx"),
    "a digest that is a number": (member(files={GRAPH: 1, GOLDEN: 2}), "files"),
    "a row larger than any memory": (member(state_size=2**60), "state_size"),
    "a row below nothing": (member(state_size=-1), "state_size"),
    "a parity that is null": (member(parity=None), "parity"),
    "a version of its own": (member(version="7"), "the manifest belongs to"),
    "a format to come": (member(format=2), "format"),
}
