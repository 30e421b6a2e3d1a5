"""Reads and writes time steps as CSV, JSONL, raw values, or text for models of bytes."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from unroll.client.errors import InvalidInput
from unroll.client.tensors import Model, Tensor

_BOOLS = {"true": True, "1": True, "false": False, "0": False}
#: Parsers of a cell, by the dtype's kind.
_PARSERS: dict[str, Callable[[str], object]] = {"f": float, "i": int, "b": _BOOLS.__getitem__}

#: One time step: an array per input, in the model's order.
Row = tuple[np.ndarray, ...]
#: Writes the outputs of one time step, given in the model's order.
Write = Callable[[Sequence[np.ndarray]], None]


def columns_of(model: Model, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Stack time steps into one array (T, *shape) per input."""
    return {spec.name: np.stack(arrays) for spec, arrays in zip(model.inputs, zip(*rows, strict=True), strict=True)}


def _read_csv(model: Model, source: BinaryIO, columns: str | None) -> Iterator[Row]:
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(source))
    wanted = None if columns is None else columns.split(",")
    places: list[int] | None = None
    for number, cells in enumerate(csv.reader(lines), 1):
        if not cells:
            continue
        if places is None:
            names = [cell.strip() for cell in cells]
            has_names = not any(_is_number(name) or name.lower() in _BOOLS or not name for name in names)
            places = _places(names if has_names else None, wanted, len(cells))
            if has_names:
                continue
        try:
            values = [cells[place] for place in places]
        except IndexError:
            raise InvalidInput(f"row {number} has {len(cells)} columns, too few") from None
        yield _divided(model, values, f"row {number}")


def _places(names: list[str] | None, wanted: list[str] | None, count: int) -> list[int]:
    """The indices of the columns to send. Raises InvalidInput."""
    if wanted is None:
        return list(range(count))
    if names is None:
        raise InvalidInput("--columns needs a first row that names the columns")
    if missing := [name for name in wanted if name not in names]:
        raise InvalidInput(f"there is no column {missing[0]!r}; there are {names}")
    return [names.index(name) for name in wanted]


def _divided(model: Model, values: Sequence[str], where: str) -> Row:
    """Divide the cells of a row among the inputs, in order."""
    size = sum(spec.size for spec in model.inputs)
    if len(values) != size:
        raise InvalidInput(
            f"{where} has {len(values)} values, and a time step of {model.name!r} has {size}; --columns chooses some"
        )
    row, begin = [], 0
    for spec in model.inputs:
        row.append(_parsed(spec, values[begin : begin + spec.size], where))
        begin += spec.size
    return tuple(row)


def _parsed(spec: Tensor, cells: Sequence[str], where: str) -> np.ndarray:
    if spec.nan:
        cells = [cell if cell.strip() else "nan" for cell in cells]
    if not all(map(str.strip, cells)):
        raise InvalidInput(f"{where}: a value of {spec.name!r} is missing: fill the gap, or omit the row")
    try:
        read = _PARSERS[spec.numpy.kind]
        return np.array([read(cell.strip().lower()) for cell in cells], spec.numpy).reshape(spec.shape)
    except (ValueError, OverflowError, KeyError) as error:
        raise InvalidInput(f"{where}: {spec.name!r} takes {spec.dtype}: {error}") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_jsonl(model: Model, source: BinaryIO, columns: str | None) -> Iterator[Row]:
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"line {number} is not JSON: {error}") from error
        try:
            yield tuple(model.inputs_of(values, ""))
        except InvalidInput as error:
            raise InvalidInput(f"line {number}: {error}") from error


def _read_raw(model: Model, source: BinaryIO, columns: str | None) -> Iterator[Row]:
    size = sum(spec.size * spec.numpy.itemsize for spec in model.inputs)
    while content := source.read(size):
        if len(content) < size:
            raise InvalidInput(f"the last time step has {len(content)} of {size} bytes")
        row, begin = [], 0
        for spec in model.inputs:
            row.append(np.frombuffer(content, spec.numpy, spec.size, begin).reshape(spec.shape))
            begin += row[-1].nbytes
        yield tuple(row)


def output_names(model: Model) -> list[str]:
    """Of each value of a time step."""
    return [spec.name if spec.size == 1 else f"{spec.name}_{i}" for spec in model.outputs for i in range(spec.size)]


def _write_csv(model: Model, out: BinaryIO) -> Write:
    out.write((",".join(output_names(model)) + "\n").encode())
    return lambda arrays: _line(out, ",".join(str(value) for array in arrays for value in array.ravel()))


def _write_jsonl(model: Model, out: BinaryIO) -> Write:
    def write(arrays: Sequence[np.ndarray]) -> None:
        lists = [json.loads(_shortest(array)) for array in arrays]
        one = len(model.outputs) == 1
        _line(out, json.dumps(lists[0] if one else dict(zip([s.name for s in model.outputs], lists, strict=True))))

    return write


def _shortest(array: np.ndarray) -> str:
    """Format as JSON, with the fewest digits that identify each value."""
    if array.ndim:
        return f"[{','.join(map(_shortest, array))}]"
    return str(array.item()).lower() if array.dtype == bool else str(array[()])


def _write_raw(model: Model, out: BinaryIO) -> Write:
    def write(arrays: Sequence[np.ndarray]) -> None:
        for array in arrays:
            out.write(array.tobytes())

    return write


def _line(out: BinaryIO, text: str) -> None:
    out.write(f"{text}\n".encode())


def check_takes_bytes(model: Model) -> None:
    """Raise InvalidInput unless the model takes one byte per time step."""
    if len(model.inputs) != 1 or model.inputs[0].shape or model.inputs[0].numpy.kind != "i":
        raise InvalidInput(f"{model.name!r} is not a model of bytes: lines need one integer as input")


def _read_lines(model: Model, source: BinaryIO, columns: str | None) -> Iterator[Row]:
    """Yield a time step for each byte, including line ends."""
    check_takes_bytes(model)
    for line in source:
        for byte in line:
            yield (np.array(byte, model.inputs[0].numpy),)


def _write_lines(model: Model, out: BinaryIO) -> Write:
    """Write the most probable next byte of each time step."""
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 1 or model.outputs[0].size > 256:
        raise InvalidInput(f"{model.name!r} is not a model of bytes: lines need one output of at most 256 values")

    def write(arrays: Sequence[np.ndarray]) -> None:
        out.write(bytes([int(arrays[0].argmax())]))

    return write


READERS: dict[str, Callable[[Model, BinaryIO, str | None], Iterator[Row]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "raw": _read_raw,
    "lines": _read_lines,
}
WRITERS: dict[str, Callable[[Model, BinaryIO], Write]] = {
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "raw": _write_raw,
    "lines": _write_lines,
}
