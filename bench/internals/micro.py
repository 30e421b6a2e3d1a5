"""Measures the parts of a step separately, in one process and without I/O: nanoseconds per step.

    python -m bench.internals.micro [--only WORD] [--repository DIR] [--json FILE]

Each figure is the minimum of many short runs: the cost of the part without disturbance.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from bench.http_client import infer_body
from bench.websocket_client import steps_message
from unroll import bundle
from unroll.bundle import Bundle, Manifest, TensorSpec
from unroll.service.engine.engine import PlainRows
from unroll.service.engine.host_engine import HostEngine
from unroll.service.engine.runner import Runner
from unroll.service.protocol import json as json_protocol
from unroll.service.protocol import open_inference
from unroll.service.protocol.frames import (
    FrameCodec,
    SingleEntryFrame,
    encode,
    encode_single,
    pack_entries,
    with_positions,
)
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.chunk import Chunk, GroupReply
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Cohort

_FEATURES = 16
_ROWS = (1, 16, 64, 256)
_SPEC_IN = TensorSpec("x", "float32", (_FEATURES,), True)
_SPEC_OUT = TensorSpec("y", "float32", (_FEATURES,), True)
_LIMIT = 2**21
#: A run repeats the part until it takes this long, so that reading the clock is negligible.
_RUN_SECONDS = 0.002
_LEAST_RUNS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """A repeatable call that does the work of `steps` time steps."""

    name: str
    steps: int
    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Figure:
    """Nanoseconds per time step: the minimum and median of all runs."""

    name: str
    steps: int
    least: float
    median: float
    runs: int


def measure(part: Part, seconds: float, now: Callable[[], float] = perf_counter) -> Figure:
    """Run a part for about `seconds`."""
    calls = 1
    while (took := min(_run(part.call, calls, now) for _ in range(3))) < _RUN_SECONDS:
        calls = calls * 2 if took <= 0 else max(calls + 1, min(calls * 10, round(calls * _RUN_SECONDS * 1.2 / took)))
    started = now()
    runs: list[float] = []
    while len(runs) < _LEAST_RUNS or now() - started < seconds:
        runs.append(_run(part.call, calls, now) / calls / part.steps * 1e9)
    return Figure(part.name, part.steps, min(runs), median(runs), len(runs))


def _run(call: Callable[[], object], calls: int, now: Callable[[], float]) -> float:
    started = now()
    for _ in range(calls):
        call()
    return now() - started


# ── protocol ─────────────────────────────────────────────────────────────────────────────────────


def manifest() -> Manifest:
    """The manifest of a model with 16 values in and out."""
    return Manifest(
        format=1,
        name="micro",
        version="1",
        inputs=(_SPEC_IN,),
        outputs=(_SPEC_OUT,),
        state=(),
        state_size=1,
        initial_state=None,
        streamable=True,
        not_streamable_because=None,
        ragged=True,
        bit_exact=True,
        parity=(),
        files={},
        tools={},
    )


def protocol() -> Iterator[Part]:
    codec = Codec(manifest(), 65_536, 1024)
    x = np.random.default_rng(0).standard_normal((1, _FEATURES), np.float32)
    outputs = (x.copy(),)
    raw = x.tobytes()
    yield Part("protocol: read raw bytes", 1, lambda: codec.from_raw(raw, None))
    yield Part("protocol: write raw bytes", 1, lambda: codec.to_raw(outputs))

    text = json_protocol.dump({"inputs": x, "position": 7})
    yield Part("protocol: read JSON", 1, lambda: codec.from_json(json_protocol.parse_object(text, _LIMIT)["inputs"]))
    document = {"outputs": codec.to_json(outputs), "position": 8}
    yield Part("protocol: write JSON", 1, lambda: json_protocol.dump(document))

    head, body = infer_body(x, sequence_id=7, sequence_start=False, sequence_end=False)
    yield Part(
        "protocol: read infer, binary",
        1,
        lambda: open_inference.read_inputs(open_inference.parse(body, head, _LIMIT), (_SPEC_IN,)),
    )
    answer = {"model_name": "micro", "model_version": "1"}
    batched = x[np.newaxis]
    yield Part(
        "protocol: write infer, binary", 1, lambda: open_inference.describe(answer, [(_SPEC_OUT, batched, True)])
    )

    frames = FrameCodec((_SPEC_IN,), 65_536)
    for entries in (1, 64, 256):
        frame = steps_message(range(entries), np.ones((entries, _FEATURES), np.float32))
        yield Part(f"protocol: read frame of {entries}", entries, partial(_read_frame, frames, frame))
    yield Part("protocol: write frame of 1", 1, lambda: encode_single(0, 1, 8, outputs))
    for entries in (64, 256):
        asked = pack_entries(range(entries), [1] * entries, [7] * entries)
        positions, values = np.full(entries, 8, np.uint64), np.zeros((entries, 1, _FEATURES), np.float32)
        yield Part(
            f"protocol: write frame of {entries}",
            entries,
            partial(_write_frame, asked, positions, values),
        )


def _read_frame(codec: FrameCodec, content: bytes) -> None:
    frame = codec.decode_single(content) or codec.decode(content)
    if codec.fault(frame.inputs) if isinstance(frame, SingleEntryFrame) else codec.faults(frame):
        raise ValueError("the frame is sound")


def _write_frame(asked: np.ndarray, positions: np.ndarray, values: np.ndarray) -> bytes:
    return encode(with_positions(asked, positions), [values.data])


# ── scheduler ────────────────────────────────────────────────────────────────────────────────────


def scheduler() -> Iterator[Part]:
    """A step of every session: submitted, batched, completed and answered, without the model."""
    for sessions in _ROWS:
        yield Part(f"scheduler: {sessions} sessions", sessions, Turns(sessions).step_as_chunks)
    for sessions in _ROWS[1:]:
        yield Part(f"scheduler: a group of {sessions}", sessions, Turns(sessions).step_as_group)
        yield Part(f"scheduler: a cohort of {sessions}", sessions, Turns(sessions).step_as_cohort)


class Turns:
    """Sessions that step in turns; `answered` counts the steps so far."""

    def __init__(self, sessions: int) -> None:
        traits = ModelTraits((_SPEC_IN,), (_SPEC_OUT,), cuttable=True, ragged=True)
        self.scheduler = Scheduler(traits, SessionLimits(capacity=4096), SchedulerLimits())
        self.answered = 0
        self._sessions = [self.scheduler.open(f"session-{i}", 0.0) for i in range(sessions)]
        self._together = np.zeros((sessions, 1, _FEATURES), np.float32)
        self._inputs = [(row,) for row in self._together]
        self._no_positions = [None] * sessions
        self._cohorts: list[Cohort] = []
        self._now = 0.0

    def step_as_chunks(self) -> None:
        now = self._tick()
        submit, settled = self.scheduler.submit, self._on_chunk_done
        for session, inputs in zip(self._sessions, self._inputs, strict=True):
            chunk = Chunk(inputs, session)
            submit(chunk, now, now + 30.0)
            chunk.listeners = (settled,)
        self._turn(now)

    def step_as_group(self, *, again: bool = False) -> None:
        now = self._tick()
        self.scheduler.groups.submit(
            self._sessions, self._no_positions, (self._together,), now, now + 30.0, self._on_group_done, again=again
        )
        self._turn(now)

    def step_as_cohort(self) -> None:
        now = self._tick()
        if not self._cohorts:
            self.step_as_group(again=True)
        taken = self.scheduler.groups.submit_cohorts(
            self._cohorts, None, (self._together,), now, now + 30.0, self._on_group_done
        )
        assert taken
        self._turn(now)

    def _tick(self) -> float:
        self._now += 1e-4
        return self._now

    def _turn(self, now: float) -> None:
        _, batch = self.scheduler.next_turn(now)
        self.scheduler.complete(batch, (batch.inputs[0],), {}, now, 1e-4)

    def _on_chunk_done(self, outcome: object) -> None:
        self.answered += 1

    def _on_group_done(self, reply: GroupReply) -> None:
        self.answered += len(reply.positions)
        self._cohorts = [] if reply.cohort is None else [reply.cohort]


# ── engine ───────────────────────────────────────────────────────────────────────────────────────


def engine(found: Bundle) -> Iterator[Part]:
    """Single steps of a model: onnxruntime alone, and with gather and scatter of the state."""
    about = found.manifest
    runner = Runner(found.model, about)
    engine = HostEngine(runner, about, 4096)
    for rows in _ROWS:
        by_name = {spec.name: np.zeros((rows, 1, *spec.shape), spec.numpy) for spec in about.inputs}
        state, lens = np.zeros((rows, about.state_size), np.float32), np.ones(rows, np.int32)
        yield Part(
            f"{about.name}: runner, {rows} rows",
            rows,
            partial(runner, by_name, state, lens),
        )
        slots = [int(slot) for slot in np.random.default_rng(rows).permutation(4094)[:rows] + 2]
        batch = PlainRows(tuple(by_name.values()), [1] * rows, slots, slots)
        yield Part(f"{about.name}: engine, {rows} rows", rows, partial(engine.run, batch))


def parts(repository: Path) -> Iterator[Part]:
    yield from protocol()
    yield from scheduler()
    for path in bundle.discover(repository):
        yield from engine(bundle.read(path))


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def table(figures: list[Figure]) -> str:
    width = max([len(figure.name) for figure in figures], default=0) + 2
    lines = [f"{'':<{width}}{'ns/step':>11}{'median':>11}{'runs':>7}"]
    lines += [f"{f.name:<{width}}{f.least:>11,.0f}{f.median:>11,.0f}{f.runs:>7}" for f in figures]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.internals.micro", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="only parts whose name contains WORD")
    parser.add_argument("--seconds", type=float, default=0.3, help="per part, at most 60")
    parser.add_argument(
        "--repository", type=Path, default=Path("examples/repository"), help="bundles for the engine's parts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds <= 60:
        parser.error("out of bounds, see --help")
    found = [part for part in parts(arguments.repository) if arguments.only in part.name]
    if not found:
        print(f"no part's name contains {arguments.only!r}", file=sys.stderr)
        return 2
    figures = [measure(part, arguments.seconds) for part in found]
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
