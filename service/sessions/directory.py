"""Finds the version that serves a session, or that knows how the session ended."""

from unroll.service.core.clock import Clock
from unroll.service.core.errors import ModelChanged, SessionExists
from unroll.service.core.session_ids import shown
from unroll.service.models.served_model import ServedModel
from unroll.service.models.versions import ModelVersions
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.reply import payload_digest
from unroll.service.scheduler.session import Session
from unroll.service.sessions.spilled import SpilledSessions
from unroll.service.store.record import Gone, Record


class SessionDirectory:
    """The sessions of this process: those with a row on a served version, and the spilled ones.

    Attributes:
        stranded: Model, id and record (or tombstone) of the session that was just looked up in the store, if its
            version is not here. Such a session can only be closed or replaced.
    """

    def __init__(self, versions: ModelVersions, spilled: SpilledSessions, clock: Clock) -> None:
        self.versions = versions
        self.spilled = spilled
        self._clock = clock
        self.stranded: tuple[str, str, Record | Gone] | None = None

    def find_stranded(self, name: str, session_id: str) -> Record | None:
        """The open session, if its version is not here."""
        found = self._stranded(name, session_id)
        return found if isinstance(found, Record) else self.spilled.find_stranded(name, session_id)

    def check_closing_chunk(self, name: str, session_id: str, chunk: Chunk) -> None:
        """Raise the error of `ModelVersions.home` if this chunk closed a session of a version that is not here.

        Only that version can read the kept reply.
        """
        gone = self._stranded(name, session_id)
        if not isinstance(gone, Gone):
            return
        last = gone.kept[-1]
        if (last.start, last.digest) == (chunk.start, payload_digest(chunk.inputs)):
            self.versions.home(name, gone.origin.model, f"session {shown(session_id)!r} ran on")

    def _stranded(self, name: str, session_id: str) -> Record | Gone | None:
        if self.stranded is None or self.stranded[:2] != (name, session_id):
            return None
        return self.stranded[2]

    def living(self, name: str, session_id: str) -> tuple[ServedModel, Session] | None:
        """The session and its version, if it is here. A spilled session gets a row again."""
        now = self._clock.now()
        for model in self.versions.of(name):
            if (session := model.scheduler.sessions.get_detached(session_id, now)) is not None:
                return model, session
        return self.spilled.bring_back(name, session_id)

    def is_unused(self, name: str, session_id: str) -> bool:
        """Whether it is certain, without a lookup among spilled sessions, that no open session has this id."""
        return not len(self.spilled) and not any(session_id in m.scheduler.sessions for m in self.versions.of(name))

    def owner(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session | None]:
        """The session and its version.

        Returns:
            Without an open session: the version on which it ended last, otherwise the one for new sessions; and None.

        Raises:
            ModelUnknown: There is no such model or version.
            ModelChanged: The session's version is not the requested one, or is retired.
            VersionUnavailable: The session's version is not here.
        """
        return self.owner_of(self.living(name, session_id), name, version, session_id)

    def owner_of(
        self, living: tuple[ServedModel, Session] | None, name: str, version: str | None, session_id: str
    ) -> tuple[ServedModel, Session | None]:
        """Like `owner`, for a caller that already has the result of `living`."""
        if living is not None:
            served = living[0]
            if version not in (None, served.version):
                raise ModelChanged(f"session {shown(session_id)!r} runs on version {served.version}, not {version}")
            return living
        if (stranded := self.find_stranded(name, session_id)) is not None:
            return self.versions.home(name, stranded.origin.model, f"session {shown(session_id)!r} runs on"), None
        now = self._clock.now()
        ended: tuple[float, ServedModel] | None = None
        for model in self.versions.of(name):
            tombstone = model.scheduler.sessions.closed.get(session_id, now)
            if tombstone is not None and version in (None, model.version) and (not ended or tombstone.since > ended[0]):
                ended = tombstone.since, model
        return (ended[1] if ended else self.versions.resolve(name, version)), None

    def find(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session]:
        """The session and its version.

        Raises:
            ModelUnknown: There is no such model or version.
            ModelChanged: The session's version is not the requested one.
            SessionError: The session is not here; the class says why.
        """
        served, session = self.owner(name, version, session_id)
        if session is None:
            raise served.ended(session_id)
        return served, session

    def check_free(self, name: str, session_id: str) -> None:
        """Raises SessionExists if a session with this id is open."""
        if (living := self.living(name, session_id)) is not None:
            raise SessionExists(f"session {shown(session_id)!r} is open", position=living[1].position)
        if (stranded := self.find_stranded(name, session_id)) is not None:
            raise SessionExists(f"session {shown(session_id)!r} is open", position=stranded.position)
