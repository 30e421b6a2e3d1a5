"""What `unroll stream` does: sends rows through a session, and writes the outputs."""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from unroll.client.client import Client, Session
from unroll.client.errors import InvalidInput, UnrollError
from unroll.client.tensors import Model, Tensor

if TYPE_CHECKING:
    from unroll.commands.stream import Stream

#: Time steps per request of a file without --rate. Rows of a pipe are sent as they come.
_CHUNK = 64

_BOOLS = {"true": True, "1": True, "false": False, "0": False}
#: By the kind of a dtype: reads a cell.
_PARSERS: dict[str, Callable[[str], object]] = {"f": float, "i": int, "b": _BOOLS.__getitem__}

#: One time step: an array per input, in the model's order.
Row = tuple[np.ndarray, ...]


def run(options: "Stream") -> int:
    """Returns 0, or 1 with the reason on stderr."""
    try:
        steps = _run(options)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UnrollError, OSError, UnicodeDecodeError, csv.Error) as error:
        print(f"unroll stream: {error}", file=sys.stderr)
        return 1
    print(f"{steps} steps", file=sys.stderr)
    return 0


def _run(options: "Stream") -> int:
    """Returns the number of steps that were sent."""
    kind = options.format or (options.file and options.file.suffix.lstrip(".").lower())
    kind = kind if kind in _READERS else "csv"
    with ExitStack() as stack:
        client = stack.enter_context(Client(options.url, api_key=options.api_key))
        if options.session is None:
            session = stack.enter_context(client.session(options.model, durability=options.durability))
        else:
            session = client.session(options.model, options.session, mode="either", durability=options.durability)
        source = sys.stdin.buffer if options.file is None else stack.enter_context(options.file.open("rb"))
        rows = _READERS[kind](session.model, source, options.columns)
        if session.position:
            print(f"session {session.id!r} has had {session.position} steps: as many rows are skipped", file=sys.stderr)
            rows = islice(rows, session.position, None)
        live = options.file is None or options.rate is not None
        write = _WRITERS[kind](session.model, sys.stdout.buffer)
        return _send(session, _paced(rows, options.rate), write, 1 if live else _CHUNK)


def _send(session: Session, rows: Iterable[Row], write: Callable[[Sequence[np.ndarray]], None], chunk: int) -> int:
    model, sent = session.model, 0
    waiting = iter(rows)
    while taken := list(islice(waiting, chunk)):
        columns = {
            spec.name: np.stack(arrays) for spec, arrays in zip(model.inputs, zip(*taken, strict=True), strict=True)
        }
        if any(not spec.time for spec in model.outputs):
            raise InvalidInput(f"{model.name!r} has an output without a time axis: use `unroll.Client`")
        outputs = session.steps(columns)
        named = outputs if len(model.outputs) > 1 else {model.outputs[0].name: outputs}
        for row in range(len(taken)):
            write([named[spec.name][row] for spec in model.outputs])
        sys.stdout.buffer.flush()
        sent += len(taken)
    return sent


def _paced(rows: Iterable[Row], rate: float | None) -> Iterator[Row]:
    due = time.monotonic()
    for row in rows:
        if rate is not None:
            time.sleep(max(0.0, due - time.monotonic()))
            due += 1 / rate
        yield row


# ── formats ──────────────────────────────────────────────────────────────────────────────────────


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
    """The columns to send. Raises InvalidInput."""
    if wanted is None:
        return list(range(count))
    if names is None:
        raise InvalidInput("--columns needs a first row that names the columns")
    if missing := [name for name in wanted if name not in names]:
        raise InvalidInput(f"there is no column {missing[0]!r}; there are {names}")
    return [names.index(name) for name in wanted]


def _divided(model: Model, values: Sequence[str], where: str) -> Row:
    """The cells of a row as the inputs, one after another."""
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


def _write_csv(model: Model, out: BinaryIO) -> Callable[[Sequence[np.ndarray]], None]:
    names = [
        spec.name if spec.size == 1 else f"{spec.name}_{i}" for spec in model.outputs for i in range(max(spec.size, 1))
    ]
    out.write((",".join(names) + "\n").encode())
    return lambda arrays: _line(out, ",".join(str(value) for array in arrays for value in array.ravel()))


def _write_jsonl(model: Model, out: BinaryIO) -> Callable[[Sequence[np.ndarray]], None]:
    def write(arrays: Sequence[np.ndarray]) -> None:
        lists = [json.loads(_shortest(array)) for array in arrays]
        one = len(model.outputs) == 1
        _line(out, json.dumps(lists[0] if one else dict(zip([s.name for s in model.outputs], lists, strict=True))))

    return write


def _shortest(array: np.ndarray) -> str:
    """As JSON, with as few digits as identify each value."""
    if array.ndim:
        return f"[{','.join(map(_shortest, array))}]"
    return str(array.item()).lower() if array.dtype == bool else str(array[()])


def _write_raw(model: Model, out: BinaryIO) -> Callable[[Sequence[np.ndarray]], None]:
    def write(arrays: Sequence[np.ndarray]) -> None:
        for array in arrays:
            out.write(array.tobytes())

    return write


def _line(out: BinaryIO, text: str) -> None:
    out.write(f"{text}\n".encode())


_READERS: dict[str, Callable[[Model, BinaryIO, str | None], Iterator[Row]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "raw": _read_raw,
}
_WRITERS = {"csv": _write_csv, "jsonl": _write_jsonl, "raw": _write_raw}
