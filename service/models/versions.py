"""The served versions of all models, by name."""

from collections.abc import Iterator, Sequence

from unroll.service.core.errors import ModelChanged, ModelUnavailable, ModelUnknown
from unroll.service.models.served_model import ServedModel

#: Bundles that cannot be served, by name and version: why.
Refusals = dict[tuple[str, str], str]


class ModelVersions:
    """An index over the loaded versions; with several devices, each version is there once per device.

    Attributes:
        refused: Bundles of the repository that are not served as they are there. The version is empty if the model's
            folder cannot be listed.
    """

    def __init__(self) -> None:
        self._models: list[ServedModel] = []  # by name, newest version last
        self._by_name: dict[str, list[ServedModel]] = {}  # newest version first
        self.refused: Refusals = {}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def __repr__(self) -> str:
        return f"<ModelVersions {self._models}>"

    def add(self, models: Sequence[ServedModel]) -> None:
        self._models = sorted([*self._models, *models], key=lambda model: (model.name, int(model.version)))
        self._index()

    def remove(self, model: ServedModel) -> None:
        self._models.remove(model)
        self._index()

    def _index(self) -> None:
        self._by_name = {}
        for model in reversed(self._models):
            self._by_name.setdefault(model.name, []).append(model)

    def names(self) -> list[str]:
        """Models with a version that takes new sessions."""
        return sorted({model.name for model in self._models if not model.retired})

    def of(self, name: str) -> Sequence[ServedModel]:
        """All versions of a model on all devices, newest first, retired ones included."""
        return self._by_name.get(name, ())

    def open_sessions(self, name: str, version: str) -> int:
        """Open sessions of a version on all devices."""
        return sum(len(model.scheduler.sessions) for model in self.of(name) if model.version == version)

    def available(self, name: str) -> list[ServedModel]:
        """The versions that take new sessions, newest last, each on its least loaded device.

        Raises:
            ModelUnknown: There is no such model.
            ModelUnavailable: Its bundles are refused.
        """
        found: dict[str, ServedModel] = {}
        for model in reversed(self.of(name)):
            other = found.get(model.version)
            if not model.retired and (other is None or model.current_load < other.current_load):
                found[model.version] = model
        if not found:
            self._raise_if_refused(name)
            raise ModelUnknown(f"no model {name!r}; available: {self.names()}")
        return list(found.values())

    def resolve(self, name: str, version: str | None = None) -> ServedModel:
        """The newest version, or the requested one.

        Raises:
            ModelUnknown: There is no such model or version.
            ModelUnavailable: Its bundle is refused.
        """
        available = self.available(name)
        if version is None:
            return available[-1]
        for model in available:
            if model.version == version:
                return model
        self._raise_if_refused(name, version)
        raise ModelUnknown(f"model {name!r} has versions {[model.version for model in available]}, not {version!r}")

    def with_digest(self, name: str, digest: str) -> ServedModel | None:
        """The version with this digest, preferably not retired, on its least loaded device."""
        found = [model for model in self.of(name) if model.manifest.digest == digest]
        return min(found, key=lambda model: (model.retired, model.current_load), default=None)

    def home(self, name: str, session_id: str, digest: str) -> ServedModel:
        """Where a session of the version with this digest continues.

        Raises:
            ModelChanged: The version is not served here.
            ModelUnavailable: The same, but a bundle of the model is refused, which may be that version.
        """
        if (model := self.with_digest(name, digest)) is None:
            self._raise_if_refused(name)
            raise ModelChanged(f"session {session_id!r} runs on a version of {name!r} that is no longer served here")
        return model

    def _raise_if_refused(self, name: str, version: str | None = None) -> None:
        for (refused, its_version), why in self.refused.items():
            if refused == name and (not its_version or version in (None, its_version)):
                raise ModelUnavailable(f"version {its_version or '?'} of model {name!r} is not served: {why}")

    def successor(self, name: str, digest: str) -> ServedModel | None:
        """Who remembers sessions of the version with this digest: itself, else the newest version."""
        return self.with_digest(name, digest) or next(iter(self.of(name)), None)
