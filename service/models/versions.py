"""The index of served versions."""

from collections.abc import Iterator, Sequence

from unroll.service.core.errors import ModelChanged, ModelUnavailable, ModelUnknown, VersionUnavailable
from unroll.service.models.served_model import ServedModel

#: Reasons by name and version of bundles that cannot be served.
Refusals = dict[tuple[str, str], str]

#: Retry-After for a missing version; this server checks the repository about as often.
_RETRY_SECONDS = 1.0
#: Maximum number of missing versions remembered between two checks of the repository.
_MOST_MISSING = 100


class ModelVersions:
    """An index over the loaded versions. With several devices, each version has an instance per device.

    Attributes:
        refused: Bundles of the repository that are not served. The version is empty if the model's folder cannot be
            listed.
        current: Current version of each model.
        misdirected: Reasons by name of models with a pointer to a version that is not served here. They keep their
            current version.
        retired: Name and digest of versions that the operator retired.
        announced: Name and version of versions that are expected, according to the repository or the operator.
        missing: Name, and digest or version, of expected versions that were requested since the last check of the
            repository.
    """

    def __init__(self) -> None:
        self._models: list[ServedModel] = []  # by name, newest version last
        self._by_name: dict[str, list[ServedModel]] = {}  # newest version first
        self.refused: Refusals = {}
        self.current: dict[str, str] = {}
        self.misdirected: dict[str, str] = {}
        self.retired: set[tuple[str, str]] = set()
        self.announced: set[tuple[str, str]] = set()
        self.missing: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

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

    def problems(self) -> Refusals:
        """Refused bundles, and pointers that cannot be followed, which have an empty version."""
        return self.refused | {(name, ""): why for name, why in self.misdirected.items()}

    def names(self) -> list[str]:
        """Models with a version that accepts new sessions."""
        return sorted({model.name for model in self._models if not model.retired})

    def of(self, name: str) -> Sequence[ServedModel]:
        """All versions of a model on all devices, newest first, including retired ones."""
        return self._by_name.get(name, ())

    def open_sessions(self, name: str, version: str, tenant: str) -> int:
        return sum(model.scheduler.sessions.of_tenants[tenant] for model in self.of(name) if model.version == version)

    def available(self, name: str) -> list[ServedModel]:
        """The versions that accept new sessions, newest last, each on its least loaded device.

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

    def has_current(self, name: str) -> bool:
        return any(model.version == self.current.get(name) and not model.retired for model in self.of(name))

    def resolve(self, name: str, version: str | None = None) -> ServedModel:
        """The requested version, or the model's current one.

        Raises:
            ModelUnknown: There is no such model or version.
            ModelUnavailable: Its bundle is refused, or the model has no current version.
            VersionUnavailable: The version is announced but not here.
        """
        try:
            available = self.available(name)
        except ModelUnknown:
            self._raise_if_announced(name, version)
            raise
        wanted = self.current.get(name) if version is None else version
        for model in available:
            if model.version == wanted:
                return model
        if version is None:
            why = self.misdirected.get(name, "its bundles are being loaded")
            raise ModelUnavailable(f"model {name!r} has no current version: {why}")
        self._raise_if_refused(name, version)
        self._raise_if_announced(name, version)
        raise ModelUnknown(f"model {name!r} has versions {[model.version for model in available]}, not {version!r}")

    def with_digest(self, name: str, digest: str) -> ServedModel | None:
        """The version with this digest, preferably not retired, on its least loaded device."""
        found = [model for model in self.of(name) if model.manifest.digest == digest]
        return min(found, key=lambda model: (model.retired, model.current_load), default=None)

    def home(self, name: str, digest: str, what: str) -> ServedModel:
        """The version on which a session or snapshot with this digest continues. A missing version is noted.

        Args:
            what: Subject and verb of the error, such as "the snapshot was taken from".

        Raises:
            ModelChanged: The operator retired the version, or it belongs to another model.
            ModelUnavailable: All bundles of the model are refused.
            VersionUnavailable: The version is not here but may come.
        """
        if (model := self.with_digest(name, digest)) is not None:
            return model
        if (name, digest) in self.retired:
            raise ModelChanged(f"{what} a version of {name!r} that is retired; open a new session")
        if any(model.manifest.digest == digest for model in self._models):
            raise ModelChanged(f"{what} another model than {name!r}")
        if not self.of(name):
            self._raise_if_refused(name)
        self._note_missing(name, digest)
        refusals = [
            f"; version {key[1] or '?'} is refused: {why}" for key, why in self.refused.items() if key[0] == name
        ]
        raise VersionUnavailable(
            f"{what} a version of {name!r} that this server does not have; retry, another replica may have it"
            + "".join(refusals),
            _RETRY_SECONDS,
        )

    def of_snapshot(self, name: str, version: str | None, digest: str) -> ServedModel:
        """The version from which a snapshot was taken. version: the requested one.

        Raises:
            ModelUnknown: There is no such model.
            ModelChanged: The snapshot's version is not the requested one; or see `home`.
            VersionUnavailable: See `home`.
        """
        served = self.with_digest(name, digest)
        if served is None:
            self.available(name)
            served = self.home(name, digest, "the snapshot was taken from")
        if version not in (None, served.version):
            raise ModelChanged(f"the snapshot was taken from version {served.version}, not {version}")
        return served

    def _raise_if_refused(self, name: str, version: str | None = None) -> None:
        for (refused, its_version), why in self.refused.items():
            if refused == name and (not its_version or version in (None, its_version)):
                raise ModelUnavailable(f"version {its_version or '?'} of model {name!r} is not served: {why}")

    def _raise_if_announced(self, name: str, version: str | None) -> None:
        if version is not None and (name, version) in self.announced:
            self._note_missing(name, version)
            what = f"version {version} of model {name!r} is announced, but this server does not have it yet"
            raise VersionUnavailable(f"{what}; retry, another replica may have it", _RETRY_SECONDS)

    def _note_missing(self, name: str, which: str) -> None:
        if len(self.missing) < _MOST_MISSING:
            self.missing.add((name, which))

    def successor(self, name: str, digest: str) -> ServedModel | None:
        """The version that keeps the tombstones of the version with this digest: itself, else the newest version."""
        return self.with_digest(name, digest) or next(iter(self.of(name)), None)
