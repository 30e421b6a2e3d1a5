"""Hostile bundles: each is a valid bundle with one change, and the error code that must refuse it.

A change receives the folder of a copy. Unless it is `raw`, the manifest is then updated to match the files.
"""

import json
import os
import socket
import struct
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from damage import GOLDEN, GRAPH, MANIFEST, describe
from onnx import TensorProto, helper, numpy_helper

Change = Callable[[Path], object]
Graph = onnx.GraphProto


@dataclass(frozen=True)
class Hostile:
    """One hostile bundle.

    Attributes:
        code: The error code that must refuse it.
        change: Turns a copy of a valid bundle into this one.
        raw: Leaves the manifest as the change wrote it.
        folder: The model's folder name, if it differs from the name of the case.
    """

    code: str
    change: Change
    raw: bool = False
    folder: bytes = b""

    def make(self, path: Path) -> None:
        if not self.raw:
            self.change(path)
            describe(path, name=path.parent.name)
        else:
            describe(path, name=path.parent.name)
            self.change(path)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def instead(name: str, make: Callable[[Path], object]) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


def bind(path: Path) -> None:
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def moved_and_linked(name: str) -> Change:
    def change(path: Path) -> None:
        (path / name).rename(path.parent / name)
        (path / name).symlink_to(Path("..") / name)

    return change


def sparse(name: str, size: int) -> Change:
    return lambda path: os.truncate(path / name, size)


def _files() -> dict[str, Hostile]:
    found = {}
    for name in (MANIFEST, GRAPH, GOLDEN):
        found |= {
            f"{name} is a pipe": Hostile("bundle_file", instead(name, os.mkfifo), raw=True),
            f"{name} is a folder": Hostile("bundle_file", instead(name, Path.mkdir), raw=True),
            f"{name} is a socket": Hostile("bundle_file", instead(name, bind), raw=True),
            f"{name} leads to a device": Hostile(
                "bundle_file", instead(name, lambda path: path.symlink_to("/dev/zero")), raw=True
            ),
            f"{name} is a link to the file": Hostile("bundle_file", moved_and_linked(name), raw=True),
        }
    return found | {
        "a manifest without end": Hostile("bundle_too_large", sparse(MANIFEST, 2**40), raw=True),
        "a graph without end": Hostile("bundle_too_large", sparse(GRAPH, 2**40), raw=True),
        "vectors without end": Hostile("bundle_too_large", sparse(GOLDEN, 2**40), raw=True),
        "no vectors": Hostile("bundle_file", lambda path: (path / GOLDEN).unlink(), raw=True),
        "another graph of the same size": Hostile("bundle_digest", other_graph, raw=True),
    }


def other_graph(path: Path) -> None:
    content = bytearray((path / GRAPH).read_bytes())
    content[len(content) // 2] ^= 1
    (path / GRAPH).write_bytes(content)


_NAMES = {
    "a name with a colon": Hostile("bundle_name", lambda path: None, folder=b"ev:il"),
    "a name with a line break": Hostile("bundle_name", lambda path: None, folder=b"two\nlines"),
    "a name that colours a terminal": Hostile("bundle_name", lambda path: None, folder=b"\x1b[31mred"),
    "a name that is no text": Hostile("bundle_name", lambda path: None, folder=b"no\xfftext"),
    "a name that reads from right to left": Hostile("bundle_name", lambda path: None, folder="\u202eabc".encode()),
    "a name that is long": Hostile("bundle_name", lambda path: None, folder=b"n" * 200),
    "another bundle's name": Hostile("bundle_name", lambda path: describe(path, name="good"), raw=True),
}

# ── manifests ────────────────────────────────────────────────────────────────────────────────────


def member(code: str, **members: Any) -> Hostile:
    return Hostile(code, lambda path: describe(path, **members), raw=False)


def each(kind: str, **members: Any) -> Hostile:
    """Set these members in every entry of a list in the manifest."""

    def change(path: Path) -> None:
        entries = json.loads((path / MANIFEST).read_text())[kind]
        describe(path, **{kind: [entry | members for entry in entries]})

    return Hostile("bundle_manifest", change)


def text(change: Callable[[str], str], code: str = "bundle_manifest") -> Hostile:
    def write(path: Path) -> None:
        (path / MANIFEST).write_text(change((path / MANIFEST).read_text()))

    return Hostile(code, write, raw=True)


def with_code(code: str, hostile: Hostile) -> Hostile:
    return Hostile(code, hostile.change, hostile.raw)


_MANIFESTS = {
    "a member twice": text(lambda found: found.replace("{", '{"format": 1, ', 1)),
    "lists in lists": text(lambda found: "[" * 10**6),
    "a number of a million digits": text(lambda found: found.replace("{", '{"big": ' + "9" * 10**6 + ", ", 1)),
    "a member that nobody knows": text(lambda found: found.replace("{", '{"code": "import os", ', 1)),
    "no manifest but zeros": text(lambda found: "\0" * 4096),
    "true as a number": member("bundle_manifest", state_size=True),
    "true as the format": member("bundle_manifest", format=True),
    "a number that is a text": member("bundle_manifest", state_size="16"),
    "a row of 2^60 values": member("bundle_manifest", state_size=2**60),
    "a state that is not finite": each("state", size=float("nan")),
    "an initial state beyond float32": member("bundle_manifest", initial_state=[1e39] * 16),
    "a tolerance of infinity": each("parity", tolerance=float("inf")),
    "a tolerance below zero": each("parity", tolerance=-1.0),
    "a tolerance that is no number": each("parity", tolerance=float("nan")),
    "a tolerance that proves nothing": with_code("bundle_tolerance", each("parity", tolerance=1e30)),
    "a tolerance as large as the answers": with_code("bundle_tolerance", each("parity", tolerance=0.9)),
    "a tensor larger than any memory": each("inputs", shape=[2**31, 2**31]),
    "a tensor of a thousand dimensions": each("inputs", shape=[1] * 1000),
    "a limit below nothing": each("inputs", dtype="int64", limit=-5),
    "a limit beyond 64 bits": each("inputs", dtype="int64", limit=2**70),
    "a tensor whose name is empty": each("inputs", name=""),
    "a tensor whose name has two lines": each("inputs", name="x\nX-Header: y"),
    "a tensor whose name colours a terminal": each("outputs", name="\x1b[2J"),
    "a tensor whose name is long": each("inputs", name="x" * 10_000),
    "a tensor whose name is taken": each("inputs", name="state"),
    "a tool that moves the cursor": member("bundle_manifest", tools={"torch": "\x1b[H"}),
    "a file in another folder": text(lambda found: found.replace(f'"{GRAPH}"', '"../../etc/passwd"')),
}

# ── golden vectors ───────────────────────────────────────────────────────────────────────────────


def tensors(content: dict[str, tuple[str, list[int], list[int]]], data: bytes, head: str | None = None) -> bytes:
    described = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in content.items()}
    text = (json.dumps(described) if head is None else head).encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(text)) + text + data


def vectors(content: bytes, code: str = "bundle_golden") -> Hostile:
    return Hostile(code, lambda path: (path / GOLDEN).write_bytes(content))


def array(name: str, change: Callable[[np.ndarray], np.ndarray], code: str = "bundle_golden") -> Hostile:
    from safetensors.numpy import load_file, save_file

    def write(path: Path) -> None:
        found = load_file(path / GOLDEN)
        save_file({**found, name: np.ascontiguousarray(change(found.get(name, np.zeros(1))))}, path / GOLDEN)

    return Hostile(code, write)


def value(new: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        found.flat[0] = new
        return found

    return change


_VECTORS = {
    "a head longer than the file": vectors(struct.pack("<Q", 2**63) + b"{}"),
    "a head of nothing": vectors(b""),
    "tensors that overlap": vectors(tensors({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, bytes(12))),
    "a tensor beyond the file": vectors(tensors({"state": ("F32", [2**40], [0, 2**42])}, bytes(8))),
    "a tensor of another type than it says": vectors(tensors({"state": ("F64", [4], [0, 16])}, bytes(16))),
    "a type that nobody knows": vectors(tensors({"state": ("X7", [4], [0, 16])}, bytes(16))),
    "a head that is no text": vectors(tensors({}, b"", head='{"\udcff": 1}')),
    "a head of lists in lists": vectors(tensors({}, b"", head="[" * 100_000)),
    "a tensor that nobody knows": array("input.other", lambda a: a),
    "a state that is infinite": array("state", value(np.inf)),
    "an output that is no number": array("output.y", value(np.nan)),
    "an output that PyTorch never gave": array("output.y", value(0.5), "bundle_mismatch"),
    "no sequence": array("input.x", lambda a: a[:0]),
    "three million chunks": array("chunking.0", lambda a: np.ones(3_000_000, np.int64), "bundle_too_large"),
    "a chunk of minus one": array("chunking.0", lambda a: np.array([-1, a.sum() + 1])),
    "chunks that are no row": array("chunking.0", lambda a: a.reshape(1, -1)),
}

# ── graphs ───────────────────────────────────────────────────────────────────────────────────────


def graph(code: str, change: Callable[[onnx.ModelProto], object]) -> Hostile:
    def write(path: Path) -> None:
        model = onnx.load(path / GRAPH)
        change(model)
        (path / GRAPH).write_bytes(model.SerializeToString())

    return Hostile(code, write)


def content(code: str, change: Callable[[bytes], bytes]) -> Hostile:
    return Hostile(code, lambda path: (path / GRAPH).write_bytes(change((path / GRAPH).read_bytes())))


def feed(model: onnx.ModelProto, *nodes: onnx.NodeProto, constants: dict[str, Any] | None = None) -> None:
    """Add `extra`, the output of these nodes, to `state_out`."""
    for node in model.graph.node:
        node.output[:] = ["before" if name == "state_out" else name for name in node.output]
    for name, found in (constants or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(found), name))
    model.graph.node.extend([*nodes, helper.make_node("Add", ["before", "extra"], ["state_out"])])


def fed(code: str, *nodes: onnx.NodeProto, **constants: Any) -> Hostile:
    return graph(code, lambda model: feed(model, *nodes, constants=constants))


def weights(change: Callable[[onnx.TensorProto], object]) -> Callable[[onnx.ModelProto], object]:
    return lambda model: change(model.graph.initializer[0])


def elsewhere(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../secrets.bin")


def body(*nodes: onnx.NodeProto, inputs: tuple = (), outputs: tuple = ("inner",)) -> Graph:
    values = [helper.make_tensor_value_info(name, kind, []) for name, kind in inputs]
    return helper.make_graph(
        list(nodes), "body", values, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    )


def nested(depth: int) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["inner"], value_float=0.0)
    for _ in range(depth):
        node = helper.make_node("If", ["yes"], ["inner"], then_branch=body(node), else_branch=body(node))
        node.attribute.pop()
    return helper.make_node("If", ["yes"], ["extra"], then_branch=body(node))


def endless() -> onnx.NodeProto:
    one = [
        helper.make_node("Identity", ["going"], ["goes_on"]),
        helper.make_node("Add", ["sum", "zero"], ["inner"]),
    ]
    inputs = (("turn", TensorProto.INT64), ("going", TensorProto.BOOL), ("sum", TensorProto.FLOAT))
    loop = body(*one, inputs=inputs, outputs=("goes_on", "inner"))
    loop.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    return helper.make_node("Loop", ["turns", "yes", "zero"], ["extra"], body=loop)


def hidden(tensor: onnx.TensorProto) -> onnx.NodeProto:
    inner = body(helper.make_node("Constant", [], ["inner"], value=tensor))
    return helper.make_node("If", ["yes"], ["extra"], then_branch=inner, else_branch=inner)


def external() -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    elsewhere(tensor)
    return tensor


def nodes(count: int) -> list[onnx.NodeProto]:
    chain = [helper.make_node("Identity", [f"i{i}"], [f"i{i + 1}"]) for i in range(count)]
    return [helper.make_node("Identity", ["zero"], ["i0"]), *chain]


def function(model: onnx.ModelProto) -> None:
    made = helper.make_node("RandomNormal", [], ["b"], shape=[1])
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("local", "Made", ["a"], ["b"], [made], opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    feed(model, helper.make_node("Made", ["zero"], ["extra"], domain="local"), constants={"zero": np.float32(0)})


def replacing(model: onnx.ModelProto) -> None:
    made = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("", "Exp", ["a"], ["b"], [made], [helper.make_opsetid("", 20)]))


def divided(operator: str, result: str = "extra") -> list[onnx.NodeProto]:
    """Return nodes that compute 0, unless the processor traps the division of the least integer by -1."""
    return [
        helper.make_node("Cast", ["sequence_lens"], ["divisor"], to=TensorProto.INT64),
        helper.make_node(operator, ["least", "divisor"], ["quotients"]),
        helper.make_node("Cast", ["quotients"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["floats"], ["float"], keepdims=0),
        helper.make_node("Mul", ["float", "zero"], [result]),
    ]


def cast_twice() -> onnx.NodeProto:
    node = helper.make_node("Cast", ["zero"], ["extra"], to=TensorProto.INT64)
    node.attribute.add(name="to", type=onnx.AttributeProto.INT, i=TensorProto.FLOAT)
    return node


def twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[-1])


def circle(model: onnx.ModelProto) -> None:
    feed(model, helper.make_node("Identity", ["state_out"], ["extra"]))


def alias(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["before" if name == "state_out" else name for name in node.output]
    model.graph.node.append(helper.make_node("Identity", ["state"], ["state_out"]))


def sequence(model: onnx.ModelProto) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.input[0].type.CopyFrom(kind)


def halve_state(model: onnx.ModelProto) -> None:
    for found in (*model.graph.input, *model.graph.output):
        if found.name in {"state", "state_out"}:
            found.type.tensor_type.shape.dim[1].dim_value = 1


ZERO, YES = np.float32(0), np.array(True)
LEAST = np.int64(-(2**63))

_GRAPHS = {
    "a loop of 2^62 turns": fed("bundle_time", endless(), turns=np.int64(2**62), yes=YES, zero=ZERO),
    "a tensor of 8 GB made of nothing": fed(
        "bundle_memory",
        helper.make_node("Expand", ["zero", "size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["extra"], keepdims=0),
        zero=ZERO,
        size=np.array([2**31], np.int64),
    ),
    "rows beyond any memory": fed(
        "bundle_memory",
        helper.make_node("ConstantOfShape", ["size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["extra"], keepdims=0),
        size=np.array([2**34], np.int64),
    ),
    "random numbers": fed(
        "bundle_operator", helper.make_node("RandomNormal", [], ["extra"], shape=[1], scale=0.0), zero=ZERO
    ),
    "random numbers in a branch": fed(
        "bundle_operator",
        helper.make_node(
            "If",
            ["yes"],
            ["extra"],
            then_branch=body(helper.make_node("RandomUniform", [], ["inner"], shape=[1])),
            else_branch=body(helper.make_node("Identity", ["zero"], ["inner"])),
        ),
        yes=YES,
        zero=ZERO,
    ),
    "an operator of somebody": fed(
        "bundle_operator", helper.make_node("Run", ["zero"], ["extra"], domain="evil"), zero=ZERO
    ),
    "a picture": fed("bundle_operator", helper.make_node("ImageDecoder", ["zero"], ["extra"]), zero=ZERO),
    "an operator whose name colours a terminal": fed(
        "bundle_operator", helper.make_node("\x1b[31m", ["zero"], ["extra"]), zero=ZERO
    ),
    "a function": graph("bundle_operator", function),
    "a function in an operator's place": graph("bundle_graph", replacing),
    "integers divided by computed ones": fed("bundle_operator", *divided("Div"), zero=ZERO, least=LEAST),
    "remainders of computed integers": fed("bundle_operator", *divided("Mod"), zero=ZERO, least=LEAST),
    "integers divided in a branch": fed(
        "bundle_operator",
        helper.make_node(
            "If",
            ["yes"],
            ["extra"],
            then_branch=body(*divided("Div", "inner")),
            else_branch=body(helper.make_node("Identity", ["zero"], ["inner"])),
        ),
        yes=YES,
        zero=ZERO,
        least=LEAST,
    ),
    "a spectrum of a computed length": fed(
        "bundle_operator",
        helper.make_node("Cast", ["sequence_lens"], ["lengths"], to=TensorProto.INT64),
        helper.make_node("ReduceMin", ["lengths"], ["length"], keepdims=0),
        helper.make_node("STFT", ["signal", "step", "", "length"], ["spectrum"]),
        helper.make_node("ReduceMin", ["spectrum"], ["least"], keepdims=0),
        helper.make_node("Mul", ["least", "zero"], ["extra"]),
        zero=ZERO,
        signal=np.zeros((1, 4096, 1), np.float32),
        step=np.int64(1),
    ),
    "a layer that crashes on an empty sequence": fed(
        "bundle_operator",
        helper.make_node("GRU", ["sequence", "w", "r"], ["steps"], hidden_size=1),
        helper.make_node("ReduceMax", ["steps"], ["extra"], keepdims=0),
        sequence=np.zeros((1, 1, 1), np.float32),
        w=np.zeros((1, 3, 1), np.float32),
        r=np.zeros((1, 3, 1), np.float32),
    ),
    "random numbers of a dropout": fed(
        "bundle_operator",
        helper.make_node("Dropout", ["zero", "ratio", "yes"], ["extra"]),
        zero=ZERO,
        ratio=ZERO,
        yes=YES,
    ),
    "an attribute twice": fed("bundle_graph", cast_twice(), zero=ZERO),
    "weights in another file": graph("bundle_external_data", weights(elsewhere)),
    "a constant in another file": fed(
        "bundle_external_data", helper.make_node("Constant", [], ["extra"], value=external())
    ),
    "a branch's constant in another file": fed("bundle_external_data", hidden(external()), yes=YES),
    "weights that are texts": graph(
        "bundle_graph",
        weights(lambda found: found.CopyFrom(helper.make_tensor(found.name, TensorProto.STRING, [1], [b"x"]))),
    ),
    "weights larger than their data": graph("bundle_graph", weights(lambda found: found.dims.extend([2**40]))),
    "weights of minus one": graph("bundle_graph", weights(lambda found: found.dims.append(-1))),
    "weights of no type": graph("bundle_graph", weights(lambda found: found.ClearField("data_type"))),
    "sparse weights": graph(
        "bundle_graph",
        lambda model: model.graph.sparse_initializer.add(dims=[2**40]),
    ),
    "instructions for training": graph("bundle_graph", lambda model: model.training_info.add()),
    "branches twenty deep": fed("bundle_too_large", nested(20), yes=YES),
    "too many nodes": graph("bundle_too_large", lambda model: feed(model, *nodes(20_000), constants={"zero": ZERO})),
    "two graphs": content("bundle_graph", lambda found: found + b"\x3a\x00"),
    "a graph that is cut": content("bundle_graph", lambda found: found[:-20]),
    "a graph that is empty": content("bundle_graph", lambda found: b""),
    "a graph of zeros": content("bundle_graph", lambda found: bytes(4096)),
    "a message in messages": content("bundle_graph", lambda found: b"\x3a\x82\x80\x04" + b"\x0b" * 65_538),
    "a name twice": graph("bundle_unusable", twice),
    "nodes in a circle": graph("bundle_unusable", circle),
    "inputs that are sequences": graph("bundle_unusable", sequence),
    "a state of another size": graph("bundle_unusable", halve_state),
    "an operator set to come": graph("bundle_unusable", lambda model: setattr(model.opset_import[0], "version", 2**40)),
    "a format of ONNX to come": graph("bundle_unusable", lambda model: setattr(model, "ir_version", 2**40)),
    "an input that is missing": graph("bundle_unusable", lambda model: model.graph.input.pop()),
    "a state that never changes": graph("bundle_mismatch", alias),
    "an answer that grows": fed(
        "bundle_mismatch", helper.make_node("Identity", ["zero"], ["extra"]), zero=np.float32(1)
    ),
}

HOSTILE: dict[str, Hostile] = {**_files(), **_NAMES, **_MANIFESTS, **_VECTORS, **_GRAPHS}
