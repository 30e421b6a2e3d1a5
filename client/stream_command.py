"""Runs `unroll stream` and `unroll rollout`: sends rows through a session, and writes the outputs."""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from unroll.client import wav
from unroll.client.client import Client, Session
from unroll.client.errors import InvalidInput, UnrollError
from unroll.client.plot import Plot
from unroll.client.rows import READERS, WRITERS, Row, Write, check_takes_bytes, columns_of, output_names
from unroll.client.tensors import listed

if TYPE_CHECKING:
    from unroll.commands.rollout import Rollout
    from unroll.commands.stream import Stream

#: Time steps per request for a file without --rate. Rows from a pipe are sent one by one, as they arrive.
_CHUNK = 64
_WAV = "wav"


def run(options: "Stream") -> int:
    """Run `unroll stream`. Returns 0, or 1 with the reason on stderr."""
    return _report("stream", lambda: _stream(options))


def roll_out(options: "Rollout", mapped: Any) -> int:
    """Run `unroll rollout`, with the map as the server takes it. Returns 0, or 1 with the reason on stderr."""
    return _report("rollout", lambda: _roll_out(options, mapped))


def _report(command: str, work: Callable[[], int]) -> int:
    """Do the work, and report the number of steps or the error."""
    try:
        steps = work()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UnrollError, OSError, UnicodeDecodeError, csv.Error) as error:
        print(f"unroll {command}: {error}", file=sys.stderr)
        return 1
    print(f"{steps} step{'s' * (steps != 1)}", file=sys.stderr)
    return 0


def _stream(options: "Stream") -> int:
    """Stream rows through a session. Returns the number of steps sent."""
    kind = _kind(options.format, options.file, [*READERS, _WAV])
    with ExitStack() as stack:
        client = stack.enter_context(Client(options.url, api_key=options.api_key))
        new: Any = {"durability": options.durability, "static": _static(options)}
        if options.session is None:
            session = stack.enter_context(client.session(options.model, **new))
        else:
            session = client.session(options.model, options.session, mode="either", **new)
        model = session.model
        source = _source(options.file, stack)
        samples = wav.Reader(model, source) if kind == _WAV else None
        rows = iter(samples) if samples else READERS[kind](model, source, options.columns)
        if session.position:
            print(f"session {session.id!r} is at step {session.position}: skipping as many rows", file=sys.stderr)
            rows = islice(rows, session.position, None)
        write: Write
        if (options.to or kind) != _WAV:
            write = WRITERS[options.to or kind](model, sys.stdout.buffer)
        elif samples is None:
            raise InvalidInput("--to wav needs a WAV file as input, to take its rate")
        else:
            write = wav.Writer(model, sys.stdout.buffer, samples, samples.steps - session.position)
        plot = Plot(sys.stderr, output_names(model)) if options.plot else None
        live = options.file is None or options.rate is not None
        return _send(session, _paced(rows, options.rate), write, plot, 1 if live else _CHUNK)


def _roll_out(options: "Rollout", mapped: Any) -> int:
    """Roll out a session. Returns the number of steps fed back."""
    kind = _kind(options.format, options.file, list(READERS))
    with ExitStack() as stack:
        client = stack.enter_context(Client(options.url, api_key=options.api_key))
        if options.session is None:
            session = stack.enter_context(client.session(options.model, static=_static(options)))
        else:
            session = client.session(options.model, options.session, mode="resume")
        model = session.model
        if kind == "lines":
            check_takes_bytes(model)
        given: list[Row] = []
        if options.file is not None or options.session is None:
            given = list(READERS[kind](model, _source(options.file, stack), None))
        inputs = columns_of(model, given) if given else None
        write = WRITERS[kind](model, sys.stdout.buffer)
        plot = Plot(sys.stderr, output_names(model)) if options.plot else None
        fed_from = session.position + len(given)
        for step in session.rollout(options.steps, map=mapped, on=options.on, inputs=inputs):
            outputs = [np.asarray(output) for output in listed(model.outputs, step.outputs)]
            if kind != "lines":
                write(outputs)
            elif step.position > fed_from:  # the sampled byte, not the most probable next one
                sys.stdout.buffer.write(bytes([int(step.inputs)]))
            sys.stdout.buffer.flush()
            if plot:
                plot.add(outputs)
                plot.draw()
        if plot:
            plot.draw(end=True)
        return options.steps


def _static(options: "Stream | Rollout") -> Any:
    return None if options.static is None else json.loads(options.static)


def _kind(wanted: str | None, file: Path | None, kinds: Sequence[str]) -> str:
    """The format: as requested, otherwise by the file's suffix, otherwise CSV."""
    kind = wanted or (file.suffix.lstrip(".").lower() if file else "")
    return kind if kind in kinds else "csv"


def _source(file: Path | None, stack: ExitStack) -> BinaryIO:
    return sys.stdin.buffer if file is None else stack.enter_context(file.open("rb"))


def _send(session: Session, rows: Iterable[Row], write: Write, plot: Plot | None, chunk: int) -> int:
    model, sent = session.model, 0
    waiting = iter(rows)
    while taken := list(islice(waiting, chunk)):
        if any(not spec.time for spec in model.outputs):
            raise InvalidInput(f"{model.name!r} has an output without a time axis: use `unroll.Client`")
        outputs = listed(model.outputs, session.steps(columns_of(model, taken)))
        for row in range(len(taken)):
            step = [output[row] for output in outputs]
            write(step)
            if plot:
                plot.add(step)
        sys.stdout.buffer.flush()
        if plot:
            plot.draw()
        sent += len(taken)
    if plot:
        plot.draw(end=True)
    return sent


def _paced(rows: Iterable[Row], rate: float | None) -> Iterator[Row]:
    due = time.monotonic()
    for row in rows:
        if rate is not None:
            time.sleep(max(0.0, due - time.monotonic()))
            due += 1 / rate
        yield row
