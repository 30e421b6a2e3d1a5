"""Reads the wire format of protobuf messages without copying, because a server lacks the package `onnx`."""

from collections.abc import Iterator

Field = tuple[int, int | memoryview]


def fields(message: memoryview) -> Iterator[Field]:
    """Yield number and value of each field; the value is a number, or the content of a length-delimited field.

    Raises:
        ValueError: The content is not a message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        elif kind in {1, 2, 5}:
            size = 8 if kind == 1 else 4
            if kind == 2:
                size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("not an ONNX model: a field is longer than its message")
            yield key >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError("not an ONNX model: not a protobuf message")


def numbers(value: int | memoryview) -> Iterator[int]:
    """Yield the numbers of a field that may be packed."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("not an ONNX model: a number has no end")
