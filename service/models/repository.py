"""Keeps the served versions in line with the repository of bundles, which is rescanned on request."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from unroll.bundle import stated_digest
from unroll.bundle.errors import printable
from unroll.service.engine.runner import DeviceUnavailable
from unroll.service.models.contents import POINTER, Contents, RepositoryError, read_contents
from unroll.service.models.loading import ModelLoader, ModelRefused
from unroll.service.models.served_model import ServedModel
from unroll.service.models.versions import ModelVersions, Refusals

_log = structlog.get_logger(__name__)

#: Also the minimum interval between checks for missing versions.
_HOUSEKEEPING_SECONDS = 1.0
#: Processor time for a first trial; a slower bundle is retried after the other new ones.
_PATIENCE_SECONDS = 2.0


class ModelRepository:
    """Loads, starts, retires and stops versions.

    Args:
        versions: The index of versions to maintain.
        has_spilled: Whether there are spilled sessions of the version with this digest.
        on_crash: Called when a model's loop ends with an error.
        serve: Current version by model name; overrides the model's pointer.
        strict: Refuse to start with a bundle that cannot be served.

    Attributes:
        unloaded: Models that the operator has unloaded; their folders are ignored.
    """

    def __init__(
        self,
        path: Path,
        versions: ModelVersions,
        loader: ModelLoader,
        has_spilled: Callable[[str], bool],
        on_crash: Callable[[], None],
        serve: dict[str, str],
        *,
        strict: bool = False,
    ) -> None:
        self.path = path
        self._versions = versions
        self._loader = loader
        self._has_spilled = has_spilled
        self._on_crash = on_crash
        self._serve = serve
        self._strict = strict
        self._rescan = asyncio.Event()
        self._one_rescan = asyncio.Lock()
        self.unloaded: set[str] = set()

    def load_all(self) -> None:
        """Load every bundle.

        Raises:
            RepositoryError: There is no bundle, none can be served, or one in `serve` cannot. With `strict`, also if
                any bundle cannot be served or a pointer cannot be followed.
            DeviceUnavailable: The requested device cannot be used.
        """
        contents = read_contents(self.path)
        try:
            for key, path in contents.bundles.items():
                try:
                    self._versions.add(self._loader.load(path))
                except ModelRefused as refusal:
                    self._refuse(self._versions.refused, key, path, refusal)
        finally:
            self._loader.end_trial()
        refused = len(self._versions.refused)
        if refused and (self._strict or refused == len(contents.bundles)):
            raise RepositoryError(
                f"{refused} of {len(contents.bundles)} bundles in {self.path} refused; the log says why"
            )
        self._follow(contents)
        for name in self._versions.misdirected:
            if self._strict or name in self._serve:
                raise RepositoryError(f"model {name!r}: {self._versions.misdirected[name]}")

    def _follow(self, contents: Contents) -> None:
        versions = self._versions
        versions.retired |= contents.retired
        pointers = contents.pointers | self._serve
        versions.announced = contents.announced | {*self._serve.items()}
        before, versions.current, versions.misdirected = versions.current, {}, {}
        for name in {*versions.names(), *self._serve} - self.unloaded:
            served = [model.version for model in versions.of(name) if not model.retired]
            wanted = pointers.get(name, max(served, key=int, default=""))
            if wanted in served:
                versions.current[name] = wanted
                if wanted != before.get(name):
                    _log.info("current version", model=name, version=wanted)
                continue
            pointer = "--serve" if name in self._serve else f"the file {name}/{POINTER}"
            why = f"{pointer} says {wanted!r}, but the served versions are {sorted({*served}, key=int)}"
            versions.misdirected[name] = why
            _log.error("pointer not followed", model=name, current=before.get(name), reason=why)
            if name in before:
                versions.current[name] = before[name]

    @staticmethod
    def _refuse(refused: Refusals, key: tuple[str, str], path: Path, error: Exception) -> None:
        refusal = error if isinstance(error, ModelRefused) else ModelRefused("bundle_unusable", str(error))
        where = {"model": key[0], "version": key[1], "path": printable(str(path))}
        _log.error("bundle refused", **where, code=refusal.code, reason=str(refusal))
        refused[key] = str(refusal)

    def shut_down(self) -> None:
        """End the engine threads; `run` must have ended."""
        self._loader.shut_down()

    def request_rescan(self) -> None:
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
                    await self._look_for_missing()
                else:
                    self._rescan.clear()
                    await self.rescan()
        finally:
            self._loader.end_trial(for_good=True)  # a thread may be waiting for it
            for model in self._versions:
                await model.stop()

    async def load(self, name: str) -> None:
        """Serve the folder's versions of a model, and return when that is done.

        Raises:
            ModelUnknown: The folder has no such model.
            ModelUnavailable: Its bundles are refused, or none is current.
        """
        self.unloaded.discard(name)
        await self.rescan()
        self._versions.resolve(name)

    async def unload(self, name: str) -> None:
        """Retire all versions of a model until it is loaded again, or the process ends. Raises ModelUnknown."""
        if name not in self.unloaded and not self._versions.of(name):
            self._versions.available(name)
        self.unloaded.add(name)
        await self.rescan()

    async def rescan(self) -> None:
        """Serve new bundles, and retire removed and changed ones. A refused bundle does not affect served versions."""
        async with self._one_rescan:
            await self._do_rescan()

    def _read_contents(self) -> Contents:
        """Raises RepositoryError."""
        contents = read_contents(self.path)
        for key in [key for key in contents.bundles if key[0] in self.unloaded]:
            del contents.bundles[key]
        return contents

    async def _do_rescan(self) -> None:
        try:
            contents = await asyncio.to_thread(self._read_contents)
        except RepositoryError as error:  # probably unmounted; an empty repository does not remove the last model
            _log.error("repository not read", reason=str(error))
            return
        refused: Refusals = {}
        slow = [key for key in contents.bundles if not await self._reload(key, contents, refused, _PATIENCE_SECONDS)]
        if slow:
            self._follow(contents)
        for key in slow:
            await self._reload(key, contents, refused)
        await asyncio.to_thread(self._loader.end_trial)
        self._versions.refused = refused
        for model in self._versions:
            if not model.retired and not {(model.name, model.version), (model.name, "")} & contents.bundles.keys():
                self._retire(model)
        self._follow(contents)
        await self._drop_retired()

    async def _reload(
        self, key: tuple[str, str], contents: Contents, refused: Refusals, seconds: float | None = None
    ) -> bool:
        """Serve a bundle, unless it is served already.

        Args:
            refused: Receives the reason if the bundle is refused.
            seconds: Processor time for its trial; None for the limit.

        Returns:
            False if that was not enough, and the bundle must be retried after the others.
        """
        name, version = key
        path = contents.bundles[key]
        present = [m for m in self._versions.of(name) if m.version == version and not m.retired]
        known = {m.bundle.identity for m in present}
        try:
            loaded = await asyncio.to_thread(self._loader.load, path, known, seconds)
        except (ModelRefused, DeviceUnavailable) as refusal:
            if seconds is not None and isinstance(refusal, ModelRefused) and refusal.code == "bundle_time":
                return False
            self._refuse(refused, key, path, refusal)
            return True
        for model in present if loaded else ():
            self._retire(model)
        self._versions.add(loaded)
        for model in loaded:
            self._start(model)
        return True

    async def _look_for_missing(self) -> None:
        if missing := self._versions.missing:
            self._versions.missing = set()
            if await asyncio.to_thread(self._has_come, missing):
                await self.rescan()

    def _has_come(self, missing: set[tuple[str, str]]) -> bool:
        """Whether the repository has a bundle of a missing version that is neither served nor refused."""
        try:
            bundles = self._read_contents().bundles
        except RepositoryError:
            return False
        names = {name for name, _ in missing}
        return any(
            name in names
            and (name, version) not in self._versions.refused
            and (digest := stated_digest(path)) is not None
            and {(name, digest), (name, version)} & missing
            and self._versions.with_digest(name, digest) is None
            for (name, version), path in bundles.items()
        )

    def _retire(self, model: ServedModel) -> None:
        model.retired = True
        _log.info("model retired", model=model.name, version=model.version, sessions=len(model.scheduler.sessions))

    async def _drop_retired(self) -> None:
        for model in [m for m in self._versions if m.retired]:
            model.scheduler.sessions.expire(model.loop.clock.now())
            if not len(model.scheduler.sessions) and not model.scheduler.in_flight and not self._awaits_spilled(model):
                self._versions.remove(model)
                self._versions.retired.add((model.name, model.manifest.digest))
                for successor in self._versions.of(model.name)[:1]:
                    successor.scheduler.sessions.merge_closed(model.scheduler.sessions)
                await model.stop()
                model.engine.close()
                _log.info("model dropped", model=model.name, version=model.version)

    def _awaits_spilled(self, model: ServedModel) -> bool:
        """Whether spilled sessions can return only to this instance."""
        digest = model.manifest.digest
        return self._versions.with_digest(model.name, digest) is model and self._has_spilled(digest)

    def _start(self, model: ServedModel) -> None:
        model.start().add_done_callback(self.watch)

    def watch(self, task: asyncio.Task[None]) -> None:
        """Call `on_crash` if a task that should run until cancelled has ended with an error."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("crashed", task=task.get_name(), exc_info=error)
            self._on_crash()
