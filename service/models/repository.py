"""Which versions are served: those in the repository of bundles, looked at again on request."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from unroll.bundle import discover
from unroll.service.core.clock import Clock
from unroll.service.engine.runner import DeviceUnavailable
from unroll.service.models.loading import ModelLoader, ModelRefused
from unroll.service.models.served_model import ServedModel
from unroll.service.models.versions import ModelVersions, Refusals

_log = structlog.get_logger(__name__)

_HOUSEKEEPING_SECONDS = 5.0


class RepositoryError(Exception):
    """The repository cannot be served as it is; says why, for every bundle."""


class ModelRepository:
    """Loads, starts, retires and stops versions.

    Args:
        path: The folder of bundles.
        versions: The index that it keeps up to date.
        loader: Loads a bundle.
        clock: The clock of the sessions.
        on_crash: Called when a model's loop ends with an error.
        strict: Refuse to start with a bundle that cannot be served.
    """

    def __init__(
        self,
        path: Path,
        versions: ModelVersions,
        loader: ModelLoader,
        clock: Clock,
        on_crash: Callable[[], None],
        *,
        strict: bool = False,
    ) -> None:
        self.path = path
        self._versions = versions
        self._loader = loader
        self._clock = clock
        self._on_crash = on_crash
        self._strict = strict
        self._rescan = asyncio.Event()

    def load_all(self) -> None:
        """Load every bundle.

        Raises:
            RepositoryError: There is no bundle, or none can be served; if `strict`, one cannot be served.
            DeviceUnavailable: The requested device cannot be used.
        """
        paths = self._discover()
        for key, path in paths.items():
            try:
                self._versions.add(self._loader.load(path))
            except ModelRefused as refusal:
                self._refuse(self._versions.refused, key, path, refusal)
        refused = len(self._versions.refused)
        if refused and (self._strict or refused == len(paths)):
            raise RepositoryError(f"{refused} of {len(paths)} bundles in {self.path} refused; the log says why")

    def _discover(self) -> dict[tuple[str, str], Path]:
        """The bundles by name and version; the version is empty if a folder `<name>` cannot be listed."""
        try:
            paths = discover(self.path)
        except OSError as error:
            raise RepositoryError(f"the repository cannot be read: {error}") from error
        if not paths:
            raise RepositoryError(f"{self.path} holds no bundle (<name>/<version>/manifest.json)")
        parts = [(*path.relative_to(self.path).parts, "")[:2] for path in paths]
        return {(name, version): path for (name, version), path in zip(parts, paths, strict=True)}

    @staticmethod
    def _refuse(refused: Refusals, key: tuple[str, str], path: Path, error: Exception) -> None:
        refused[key] = str(error)
        _log.error("bundle refused", model=key[0], version=key[1], path=str(path), reason=str(error))

    def shut_down(self) -> None:
        """End the engine threads; `run` must have ended."""
        self._loader.shut_down()

    def request_rescan(self) -> None:
        """Look for new, changed and removed bundles soon."""
        self._rescan.set()

    async def run(self) -> None:
        """Run the models' loops and keep the versions up to date until cancelled."""
        try:
            for model in self._versions:
                self._start(model)
            while True:
                try:
                    async with asyncio.timeout(_HOUSEKEEPING_SECONDS):
                        await self._rescan.wait()
                except TimeoutError:
                    await self._drop_retired()
                else:
                    self._rescan.clear()
                    await self.rescan()
        finally:
            for model in self._versions:
                await model.stop()

    async def rescan(self) -> None:
        """Serve new bundles, retire removed and changed ones. A refused bundle leaves what is served as it is."""
        try:
            wanted = await asyncio.to_thread(self._discover)
        except RepositoryError as error:  # unmounted, most likely; to take the last model away, stop the server
            _log.error("repository not read", reason=str(error))
            return
        refused: Refusals = {}
        for (name, version), path in wanted.items():
            present = [m for m in self._versions.of(name) if m.version == version and not m.retired]
            try:
                loaded = await asyncio.to_thread(self._loader.load, path, {m.bundle.identity for m in present})
            except (ModelRefused, DeviceUnavailable) as refusal:
                self._refuse(refused, (name, version), path, refusal)
                continue
            for model in present if loaded else ():
                self._retire(model)
            self._versions.add(loaded)
            for model in loaded:
                self._start(model)
        self._versions.refused = refused
        for model in self._versions:
            if not model.retired and not {(model.name, model.version), (model.name, "")} & wanted.keys():
                self._retire(model)
        await self._drop_retired()

    def _retire(self, model: ServedModel) -> None:
        model.retired = True
        _log.info("model retired", model=model.name, version=model.version, sessions=len(model.scheduler.sessions))

    async def _drop_retired(self) -> None:
        """Drop retired versions whose last session ended."""
        for model in [m for m in self._versions if m.retired]:
            model.scheduler.sessions.expire(self._clock.now())
            if not len(model.scheduler.sessions) and not model.scheduler.in_flight:
                self._versions.remove(model)
                for heir in self._versions.of(model.name)[:1]:
                    heir.scheduler.sessions.merge_closed(model.scheduler.sessions)
                await model.stop()
                model.engine.close()
                _log.info("model dropped", model=model.name, version=model.version)

    def _start(self, model: ServedModel) -> None:
        model.start().add_done_callback(self.watch)

    def watch(self, task: asyncio.Task[None]) -> None:
        """Call `on_crash` if a task that should run until cancelled ended with an error."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("crashed", task=task.get_name(), exc_info=error)
            self._on_crash()
