"""One version of a model on one device, with its own sessions, loop and engine."""

import asyncio
import os
from dataclasses import dataclass, replace

import numpy as np

from unroll import bundle as bundles
from unroll.bundle import Bundle, Manifest
from unroll.service.core.choices import Precision
from unroll.service.core.errors import SnapshotInvalid, UnrollError
from unroll.service.core.session_ids import shown
from unroll.service.engine.engine import Engine
from unroll.service.models.serving_figures import ServingFigures
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.closed_sessions import CAUSES
from unroll.service.scheduler.loop import Loop
from unroll.service.scheduler.session import Session
from unroll.service.state.slots import INITIAL
from unroll.service.state.snapshot import Snapshot
from unroll.service.store.record import ID_BYTES, Gone, Origin, Record
from unroll.service.telemetry.metrics import ModelFigures


@dataclass(frozen=True, slots=True)
class Serving:
    """How a version is served on its device.

    Attributes:
        device: `cpu` or `cuda:N`.
        parity: Largest absolute difference from PyTorch float64 at load, by output and `state_out`.
        stability: Largest absolute difference of a row's results at load between batches of different sizes or rows.
    """

    device: str
    provider: str
    precision: Precision | bundles.Precision
    parity: dict[str, float]
    stability: float


class ServedModel:
    """Created by `ModelLoader`. `start` and `stop` require a running event loop.

    Attributes:
        retired: Accepts no new sessions; existing ones continue until they end.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, loop: Loop, codec: Codec, serving: Serving, figures: ServingFigures
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.loop = loop
        self.scheduler = loop.scheduler
        self.codec = codec
        self.serving = serving
        self.figures = figures
        self.retired = False
        self._task: asyncio.Task[None] | None = None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def current_load(self) -> int:
        """The load. New sessions go to the least loaded device."""
        return len(self.scheduler.sessions) + self.scheduler.in_flight

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self.loop.run(), name=f"loop {self.name}:{self.version}")
        return self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def current_figures(self) -> ModelFigures:
        return self.figures.of(self.name, self.version, self.serving.device)

    # ── sessions from and to snapshots ───────────────────────────────────────────────────────────

    def open(self, session_id: str, start: Snapshot | None) -> Session:
        """Open a memory session that starts from `start`, or from the model's initial state."""
        session = self.scheduler.open(session_id, self.loop.clock.now(), position=start.position if start else 0)
        if start is not None:
            self.write_snapshot(session, start)
        return session

    def ended(self, session_id: str) -> UnrollError:
        """The error for a request to a session that is not open."""
        return self.scheduler.sessions.closed.error(session_id, self.loop.clock.now())

    def snapshot(self, session: Session) -> Snapshot:
        return Snapshot(self.manifest.digest, session.position, self.engine.read(session.source))

    def write_snapshot(self, session: Session, snapshot: Snapshot) -> None:
        self.engine.write(session.slot, snapshot.row)
        session.source = session.slot
        session.own_progress.position = snapshot.position

    def read_snapshot(self, content: bytes) -> Snapshot:
        """Parse a snapshot. Raises SnapshotInvalid, or ModelChanged if it was taken from another version."""
        return Snapshot.from_bytes(content, digest=self.manifest.digest, state_size=self.manifest.state_size)

    # ── sessions from and to records ──────────────────────────────────────────────────────────────────────

    def origin(self, durability: str) -> Origin:
        return Origin(self.manifest.digest, durability, os.urandom(ID_BYTES))

    def record(self, session: Session) -> Record:
        """The record of an idle memory session."""
        row = self.engine.read(session.slot).tobytes() if session.source != INITIAL else b""
        if session.origin is None:
            session.origin = replace(self.origin("memory"), opened_with=session.opened_with)
        return Record(session.origin, session.position, row, self.scheduler.replay.kept(session), session.depth)

    def adopt(self, session_id: str, record: Record) -> Session:
        """Load a session from a record; see `Scheduler.adopt`.

        Raises:
            CapacityExhausted: There is no free row.
            SnapshotInvalid: The record belongs to another model.
        """
        if len(record.row) not in (0, 4 * self.manifest.state_size):
            raise SnapshotInvalid(f"the stored state of session {shown(session_id)!r} does not fit model {self.name!r}")
        session = self.scheduler.adopt(session_id, record, self.loop.clock.now())
        if record.row:
            self.engine.write(session.slot, np.frombuffer(record.row, "<f4"))
        return session

    def add_closed(self, session_id: str, gone: Gone) -> None:
        """Add a tombstone for a session that ended according to the store."""
        now = self.loop.clock.now()
        self.scheduler.sessions.add_closed(
            session_id, CAUSES[gone.cause], now, gone.origin.opened_with, *gone.kept[-1:]
        )
