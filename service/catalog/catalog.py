"""All versions of all models, by name. A session stays with the version it began on, wherever its state is meanwhile:
in the arena, in host memory (`Spill`), or in the store (`Keeper`)."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import structlog

from unroll.bundle import BundleError, discover, read
from unroll.service.catalog.keeper import Keeper
from unroll.service.catalog.model import ModelOptions, ModelRefused, ServedModel
from unroll.service.catalog.overflow import Overflow
from unroll.service.core.clock import Clock
from unroll.service.core.errors import ModelChanged, ModelUnknown, NeedsStoreLookup
from unroll.service.engine.runner import DeviceUnavailable
from unroll.service.scheduler.session import Session
from unroll.service.store.interface import Store

_log = structlog.get_logger(__name__)

_HOUSEKEEPING_SECONDS = 5.0


class CatalogError(Exception):
    """The repository cannot be served as it is; says why, for every bundle."""


class Catalog:
    """places: the devices, each with its engine thread; every version is served on all of them. `on_crash()` is called
    if a model's loop, or the catalog's own, ends by an error, which none should."""

    def __init__(
        self,
        repository: Path,
        options: ModelOptions,
        clock: Clock,
        places: Sequence[tuple[str, Executor]],
        store: Store | None = None,
    ) -> None:
        self.repository = repository
        self.options = options
        self.clock = clock
        self.store = store
        self.keeper = None if store is None else Keeper(store, self._all, self.living)
        self.overflow = Overflow(options, clock, self._all, store)
        self._places = places
        self.on_crash: Callable[[], None] = lambda: None
        self._models: list[ServedModel] = []  # by name, newest version last
        self._by_name: dict[str, list[ServedModel]] = {}  # newest version first
        self._rescan = asyncio.Event()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def names(self) -> list[str]:
        return sorted({model.name for model in self._models if not model.retired})

    def versions(self, name: str) -> list[ServedModel]:
        """Versions that take new sessions, newest last, each on the device that has least to do.

        Raises ModelUnknown if there are none.
        """
        found: dict[str, ServedModel] = {}
        for model in reversed(self._by_name.get(name, ())):
            other = found.get(model.version)
            if not model.retired and (other is None or model.load_now < other.load_now):
                found[model.version] = model
        if not found:
            raise ModelUnknown(f"no model {name!r}; there are {self.names()}")
        return list(found.values())

    def sessions_of(self, name: str, version: str) -> int:
        """Open sessions of a version, on all devices."""
        return sum(len(model.scheduler.sessions) for model in self._by_name[name] if model.version == version)

    def resolve(self, name: str, version: str | None = None) -> ServedModel:
        """The newest version, or the one asked for. Raises ModelUnknown."""
        versions = self.versions(name)
        if version is None:
            return versions[-1]
        for model in versions:
            if model.version == version:
                return model
        raise ModelUnknown(f"model {name!r} has the versions {[model.version for model in versions]}, not {version!r}")

    def with_digest(self, name: str, version: str | None, digest: str) -> ServedModel:
        """The version of that digest, on the device that has least to do. Raises ModelUnknown or ModelChanged."""
        found = [model for model in self._by_name.get(name, ()) if model.manifest.digest == digest]
        if not found:
            self.resolve(name, version)
            raise ModelChanged(f"the snapshot was taken from a version of {name!r} that is not served here")
        if version not in (None, found[0].version):
            raise ModelChanged(f"the snapshot was taken from version {found[0].version}, not {version}")
        return min(found, key=lambda model: model.load_now)

    def living(self, name: str, session_id: str) -> tuple[ServedModel, Session] | None:
        """The session and the version it lives on, if it does; it is detached from its cohort, and has a row again."""
        now = self.clock.now()
        for model in self._by_name.get(name, ()):
            session = model.scheduler.sessions.get_detached(session_id, now)
            if session is not None:
                return model, session
        return self.overflow.bring_back(name, session_id) if self.overflow.holds(name, session_id) else None

    def owner(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session | None]:
        """`owner_here`, if that needs no lookup in the store. Raises NeedsStoreLookup, or what `owner_here` raises."""
        keeper = self.keeper
        if keeper is not None and not keeper.is_verified(name, session_id):
            absent = name in self._by_name and self.living(name, session_id) is None
            if absent or keeper.is_looked_up(name, session_id):
                raise NeedsStoreLookup(session_id)
        return self.owner_here(name, version, session_id)

    def owner_here(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session | None]:
        """The session and the version it lives on; else the version where one of that id ended last, or the one that
        new sessions go to, and None.

        Raises ModelUnknown, or ModelChanged if the session lives on a version other than the one asked for.
        """
        if (found := self.living(name, session_id)) is not None:
            model = found[0]
            if version is not None and version != model.version:
                raise ModelChanged(f"session {session_id!r} runs on version {model.version}, not {version}")
            return found
        now = self.clock.now()
        ended: tuple[float, ServedModel] | None = None
        for model in self._by_name.get(name, ()):
            tombstone = model.scheduler.sessions.closed.get(session_id, now)
            if tombstone is not None and version in (None, model.version) and (not ended or tombstone.since > ended[0]):
                ended = tombstone.since, model
        return ended[1] if ended else self.resolve(name, version), None

    # ── loading ──────────────────────────────────────────────────────────────────────────────────

    def load_all(self) -> None:
        """Load every bundle of the repository. Raises CatalogError if there is none, or if one is refused."""
        paths = discover(self.repository)
        if not paths:
            raise CatalogError(f"{self.repository} holds no bundle (<name>/<version>/manifest.json)")
        refusals = []
        for path in paths:
            try:
                self._models += self._load(path)
            except ModelRefused as refusal:
                refusals.append(str(refusal))
        if refusals:
            raise CatalogError("\n".join(refusals))
        self._index()

    def _is_verified(self, name: str, session_id: str) -> bool:
        return self.keeper is not None and self.keeper.is_verified(name, session_id)

    def _all(self, name: str) -> list[ServedModel]:
        return self._by_name.get(name, [])

    def _index(self) -> None:
        self._models.sort(key=lambda model: (model.name, int(model.version)))
        self._by_name = {}
        for model in reversed(self._models):
            self._by_name.setdefault(model.name, []).append(model)

    def _load(self, path: Path) -> list[ServedModel]:
        """On every device, with the same statistics."""
        models = [
            ServedModel.load(path, device, self.options, self.clock, executor, self.store, self._is_verified)
            for device, executor in self._places
        ]
        for model in models:
            model.statistics = models[0].statistics
            model.scheduler.sessions.spill = partial(self.overflow.take_in, model)
        return models

    def shut_down(self) -> None:
        """End the engine threads; `run` must have ended."""
        for _, executor in self._places:
            executor.shutdown()

    def request_rescan(self) -> None:
        """Look for new, changed and removed bundles soon."""
        self._rescan.set()

    async def run(self) -> None:
        """Runs the models' loops and keeps the catalog up to date, until cancelled."""
        try:
            for model in self._models:
                self._start(model)
            while True:
                try:
                    async with asyncio.timeout(_HOUSEKEEPING_SECONDS):
                        await self._rescan.wait()
                except TimeoutError:
                    self.overflow.expire()
                    await self._let_go()
                else:
                    self._rescan.clear()
                    await self.rescan()
        finally:
            for model in self._models:
                await model.stop()
            await self.overflow.stop()
            if self.keeper is not None:
                await self.keeper.stop()

    async def rescan(self) -> None:
        """Serve what is new, retire what is gone or changed; a refused bundle changes nothing but the log."""
        wanted = {(path.parent.name, path.name): path for path in discover(self.repository)}
        if not wanted:  # unmounted, most likely; to take the last model away, stop the server
            _log.error("repository is empty", repository=str(self.repository))
            return
        for key, path in wanted.items():
            present = [m for m in self._models if (m.name, m.version) == key and not m.retired]
            try:
                manifest = (await asyncio.to_thread(read, path)).manifest
                if any(old.manifest.digest == manifest.digest for old in present):
                    continue
                models = await asyncio.to_thread(self._load, path)
            except (BundleError, ModelRefused, DeviceUnavailable) as refusal:
                _log.error("bundle refused", reason=str(refusal))
                continue
            for old in present:
                self._retire(old)
            self._models += models
            self._index()
            for model in models:
                self._start(model)
        for model in self._models:
            if not model.retired and (model.name, model.version) not in wanted:
                self._retire(model)
        await self._let_go()

    def _retire(self, model: ServedModel) -> None:
        model.retired = True
        _log.info("model retired", model=model.name, version=model.version, sessions=len(model.scheduler.sessions))

    async def _let_go(self) -> None:
        """Drop retired models whose last session is gone."""
        for model in [m for m in self._models if m.retired]:
            model.scheduler.sessions.expire(self.clock.now())
            if not len(model.scheduler.sessions) and not model.scheduler.in_flight:
                self._models.remove(model)
                self._index()
                for heir in [m for m in self._models if m.name == model.name][-1:]:
                    heir.scheduler.sessions.merge_closed(model.scheduler.sessions)
                await model.stop()
                model.engine.close()
                _log.info("model dropped", model=model.name, version=model.version)

    def _start(self, model: ServedModel) -> None:
        model.start().add_done_callback(self.watch)

    def watch(self, task: asyncio.Task[None]) -> None:
        """Call `on_crash` if a task that should run for ever ended by an error."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("crashed", task=task.get_name(), exc_info=error)
            self.on_crash()
