"""Counts the operators of an ONNX file. It parses the protobuf itself, since a server lacks the package `onnx`."""

from collections import Counter
from collections.abc import Iterator

# Field numbers of onnx.proto, all of messages within messages.
_GRAPH, _FUNCTION = 7, 25  # of a model
_GRAPH_NODE, _FUNCTION_NODE = 1, 7
_OP_TYPE, _ATTRIBUTE, _DOMAIN = 4, 5, 7  # of a node
_SUBGRAPH, _SUBGRAPHS = 6, 11  # of an attribute

_DEFAULT_DOMAINS = {"", "ai.onnx"}


def operators(model: bytes) -> dict[str, int]:
    """Count the operators in the graph, its subgraphs (of Scan, Loop and If) and its functions.

    Args:
        model: Content of an ONNX file.

    Returns:
        Counts by operator, the most frequent first. An operator outside ONNX's own domain is called `domain.Name`.

    Raises:
        ValueError: The bytes are not an ONNX file.
    """
    found: Counter[str] = Counter()
    for number, part in _fields(memoryview(model)):
        if number == _GRAPH:
            found.update(_nodes(part, _GRAPH_NODE))
        elif number == _FUNCTION:
            found.update(_nodes(part, _FUNCTION_NODE))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _nodes(graph: memoryview, node: int) -> Iterator[str]:
    for number, part in _fields(graph):
        if number == node:
            yield from _operators_of(part)


def _operators_of(node: memoryview) -> Iterator[str]:
    name = domain = ""
    for number, part in _fields(node):
        if number == _OP_TYPE:
            name = str(part, "utf-8")
        elif number == _DOMAIN:
            domain = str(part, "utf-8")
        elif number == _ATTRIBUTE:
            for kind, graph in _fields(part):
                if kind in {_SUBGRAPH, _SUBGRAPHS}:
                    yield from _nodes(graph, _GRAPH_NODE)
    yield name if domain in _DEFAULT_DOMAINS else f"{domain}.{name}"


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of each field with a length; skip the others."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in {1, 5}:
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("not an ONNX model: a field is longer than its message")
            yield key >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError("not an ONNX model: not a protobuf message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("not an ONNX model: a number has no end")
