"""One version of a model, ready to answer: its bundle was verified, replayed on the device, and warmed up."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Self

import numpy as np
import structlog

from unroll import bundle as bundles
from unroll.bundle import Bundle, Manifest
from unroll.service.core.clock import Clock
from unroll.service.core.errors import (
    ModelChanged,
    SessionClosed,
    SessionEvicted,
    SessionExpired,
    SessionGone,
    SnapshotInvalid,
)
from unroll.service.engine.backend import DeviceBackend, EngineOptions, Precision, open_backend
from unroll.service.engine.curve import Curve, measure
from unroll.service.engine.engine import Engine, PlainRows
from unroll.service.engine.runner import DeviceUnavailable
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.batch import Batch
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.loop import Loop
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Session
from unroll.service.state.slots import INITIAL, SCRATCH
from unroll.service.store.interface import Store
from unroll.service.store.record import ID_BYTES, Gone, Origin, Record
from unroll.service.telemetry.metrics import ROWS, SECONDS, Histogram, ModelFigures
from unroll.service.telemetry.statistics import Statistics

_log = structlog.get_logger(__name__)


_CAUSES: dict[str, type[SessionGone]] = {cause.code: cause for cause in (SessionClosed, SessionExpired, SessionEvicted)}

#: Bytes on the host that a session takes besides its state row and its last step, about.
_RECORD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """max_steps, max_sequences: in one request. spill_bytes: of host memory for idle sessions that lost their row.
    fill_memory: as many sessions as fit in the share of the memory that `engine` allows, instead of
    `sessions.capacity`, on each device."""

    max_steps: int = 65_536
    max_sequences: int = 1024
    spill_bytes: int = 256 * 2**20
    fill_memory: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    sessions: SessionLimits = field(default_factory=SessionLimits)
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served, and what was measured of it there at load. provider: onnxruntime's.

    parity: largest absolute differences from PyTorch float64, by output and `state_out`. stability: of a row's results
    between batches of different size or company.
    """

    device: str
    provider: str
    precision: Precision | bundles.Precision
    parity: dict[str, float]
    stability: float


class ModelRefused(Exception):
    """A bundle that must not be served, with the reason."""


class ServedModel:
    """On one device; built by `load`. `start` and `stop` belong to a running event loop. `retired`: takes no new
    sessions."""

    def __init__(
        self, bundle: Bundle, engine: Engine, loop: Loop, codec: Codec, serving: Serving, statistics: Statistics
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.loop = loop
        self.scheduler = loop.scheduler
        self.codec = codec
        self.serving = serving
        self.statistics = statistics
        self.retired = False
        self._task: asyncio.Task[None] | None = None
        self._batch_rows = Histogram(ROWS)
        self._batch_seconds = Histogram(SECONDS)
        self._answered = 0
        loop.on_batch = self._observe

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    def __repr__(self) -> str:
        return f"<ServedModel {self.name}:{self.version} on {self.serving.device} {self.scheduler!r}>"

    @property
    def load_now(self) -> int:
        """What new work is better sent elsewhere for."""
        return len(self.scheduler.sessions) + self.scheduler.in_flight

    @classmethod
    def load(
        cls,
        path: Path,
        device: str,
        options: ModelOptions,
        clock: Clock,
        executor: Executor,
        store: Store | None = None,
        is_verified: Callable[[str, str], bool] = lambda name, session_id: False,
    ) -> Self:
        """`is_verified`: was the session of that model and id looked up in the store for the call that is running?

        Raises ModelRefused if the bundle is damaged, answers otherwise than PyTorch on this device or has no room
        there, and DeviceUnavailable."""
        started = perf_counter()
        try:
            bundle = bundles.read(path)
            manifest = bundle.manifest
            backend = open_backend(bundle, device, options.engine)
            parity = bundles.Verifier(backend.runner, manifest).replay(bundle.golden, backend.slack)
            traits = ModelTraits(manifest.inputs, manifest.outputs, manifest.streamable, manifest.ragged)
            limits = _session_limits(backend, manifest, options)
            scheduler = Scheduler(traits, limits, options.scheduler, partial(is_verified, manifest.name))
            engine, proof = backend.create_engine(scheduler.rows, options.scheduler.max_batch)
        except DeviceUnavailable:
            raise
        except Exception as error:  # whatever is wrong with one bundle must not stop the others
            raise ModelRefused(f"{path} is refused: {error}") from error
        parity |= {name: max(worst, parity[name]) for name, worst in proof.parity.items()}
        precision = options.engine.precision if manifest.precision == "float32" else manifest.precision
        serving = Serving(device, backend.runner.provider, precision, parity, proof.stability)
        try:
            curve = _warm_up(engine, manifest, options.scheduler)
        except ModelRefused:
            engine.close()
            raise
        scheduler.pace.seconds_per_step = curve.seconds(curve.max_rows) / curve.max_rows
        loop = Loop(manifest.name, scheduler, engine, store, clock, executor, curve.seconds)
        _log.info(
            "model loaded",
            model=manifest.name,
            version=manifest.version,
            device=device,
            provider=serving.provider,
            precision=serving.precision,
            parity={name: float(f"{error:.3g}") for name, error in parity.items()},
            stability=float(f"{serving.stability:.3g}"),
            session_capacity=scheduler.sessions.limits.capacity,
            microseconds_per_step=round(scheduler.pace.seconds_per_step * 1e6, 2),
            best_batch=curve.best_rows(),
            seconds=round(perf_counter() - started, 3),
        )
        return cls(
            bundle,
            engine,
            loop,
            Codec(manifest, options.max_steps, min(options.max_sequences, options.scheduler.max_queue)),
            serving,
            Statistics(curve.points(), curve.best_rows()),
        )

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self.loop.run(), name=f"loop {self.name}:{self.version}")
        return self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    # ── sessions as records ──────────────────────────────────────────────────────────────────────

    def origin(self, durability: str) -> Origin:
        """Of a session that begins here."""
        return Origin(self.manifest.digest, durability, os.urandom(ID_BYTES))

    def record(self, session: Session) -> Record:
        """A memory session that has no work, as bytes."""
        row = self.engine.read(session.slot).tobytes() if session.source != INITIAL else b""
        if session.origin is None:
            session.origin = replace(self.origin("memory"), opened_with=session.opened_with)
        return Record(session.origin, session.position, row, self.scheduler.replay.kept(session), session.depth)

    def adopt(self, session_id: str, record: Record) -> Session:
        """See `Scheduler.adopt`. Raises CapacityExhausted, or SnapshotInvalid if it is not of this model."""
        if len(record.row) not in (0, 4 * self.manifest.state_size):
            raise SnapshotInvalid(f"what is stored of session {session_id!r} is not a state of {self.name!r}")
        session = self.scheduler.adopt(session_id, record, self.loop.clock.now())
        if record.row:
            self.engine.write(session.slot, np.frombuffer(record.row, "<f4"))
        return session

    def bury(self, session_id: str, gone: Gone) -> None:
        """Remember what the store knows of a session's end."""
        last = self.scheduler.replay.read(gone.kept[-1:])
        now = self.loop.clock.now()
        self.scheduler.sessions.add_closed(session_id, _CAUSES[gone.cause], now, gone.origin.opened_with, *last)

    def figures(self) -> ModelFigures:
        counters = self.scheduler.counters
        return ModelFigures(
            self.name,
            self.version,
            self.serving.device,
            gauges={
                "unroll_sessions": len(self.scheduler.sessions),
                "unroll_session_capacity": self.scheduler.sessions.limits.capacity,
                "unroll_chunks_in_flight": self.scheduler.in_flight,
                "unroll_estimated_wait_seconds": self.scheduler.estimated_wait(),
            },
            counters={
                "unroll_steps": counters.steps,
                "unroll_chunks": counters.chunks,
                "unroll_batches": counters.batches,
                "unroll_padded_steps": counters.padded_steps,
                "unroll_replayed": counters.replayed,
                "unroll_refused": counters.refused,
                "unroll_sessions_opened": counters.opened,
                "unroll_sessions_adopted": counters.adopted,
                "unroll_sessions_restarted": counters.restarted,
            },
            labelled={
                ("unroll_failed", "code"): counters.failed,
                ("unroll_sessions_gone", "code"): counters.gone,
            },
            histograms={"unroll_batch_rows": self._batch_rows, "unroll_batch_seconds": self._batch_seconds},
        )

    def _observe(self, batch: Batch, failed: int, seconds: float) -> None:
        self._batch_rows.observe(len(batch))
        self._batch_seconds.observe(seconds)
        answered = self.scheduler.counters.chunks
        now = self.loop.clock.now()
        self.statistics.observe(now, len(batch), batch.steps, answered - self._answered, failed, batch.waited, seconds)
        self._answered = answered


def home(models: Sequence[ServedModel], session_id: str, record: Record) -> ServedModel:
    """Where a session goes on: its version, on the device that has least to do. Raises ModelChanged."""
    candidates = [model for model in models if model.manifest.digest == record.origin.model]
    if not candidates:
        raise ModelChanged(f"session {session_id!r} runs on a version that is not served here any more")
    return min(candidates, key=lambda model: model.load_now)


def _session_limits(backend: DeviceBackend, manifest: Manifest, options: ModelOptions) -> SessionLimits:
    if not options.fill_memory:
        return options.sessions
    beside = _RECORD_BYTES + sum(spec.nbytes for spec in (*manifest.inputs, *manifest.outputs))
    rows = backend.max_sessions(4 * manifest.state_size, beside) - 2 - options.scheduler.max_batch
    return replace(options.sessions, capacity=max(1, rows))


def _warm_up(engine: Engine, manifest: Manifest, limits: SchedulerLimits) -> Curve:
    """What calls on the scratch row cost."""

    def run(rows: int, steps: int) -> None:
        inputs = tuple(np.zeros((rows, steps, *spec.shape), spec.numpy) for spec in manifest.inputs)
        _, failed = engine.run(PlainRows(inputs, [steps] * rows, [INITIAL] * rows, [SCRATCH] * rows))
        if failed:
            raise ModelRefused(f"{manifest.name}:{manifest.version} cannot run a batch of {rows}: {failed[0].message}")

    return measure(run, limits.max_batch, limits.piece_steps, limits.max_batch_steps)
