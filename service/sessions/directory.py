"""Finds the version that a session lives on, or the one to ask about a session that ended."""

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
        stranded: Model, id and record of the session that was just looked up in the store, or what is left of it, if
            the version it began on is not here. Such a session can be closed or replaced, and nothing else.
    """

    def __init__(self, versions: ModelVersions, spilled: SpilledSessions, clock: Clock) -> None:
        self.versions = versions
        self.spilled = spilled
        self._clock = clock
        self.stranded: tuple[str, str, Record | Gone] | None = None

    def find_stranded(self, name: str, session_id: str) -> Record | None:
        """The open session, if the version it began on is not here."""
        found = self._stranded(name, session_id)
        return found if isinstance(found, Record) else self.spilled.find_stranded(name, session_id)

    def check_closing_chunk(self, name: str, session_id: str, chunk: Chunk) -> None:
        """Raise the error of `ModelVersions.home` if this chunk closed a session whose version is not here.

        Its reply is kept in that version's form.
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
        """The session and its version, if it lives here; a spilled session gets a row again."""
        now = self._clock.now()
        for model in self.versions.of(name):
            if (session := model.scheduler.sessions.get_detached(session_id, now)) is not None:
                return model, session
        return self.spilled.bring_back(name, session_id)

    def owner(self, name: str, version: str | None, session_id: str) -> tuple[ServedModel, Session | None]:
        """The session and its version; for a session that ended, the version it ended on last, and else the version
        that takes new sessions.

        Raises:
            ModelUnknown: There is no such model or version.
            ModelChanged: The session lives on another version than the requested one, or on a retired one.
            VersionUnavailable: It lives on a version that is not here.
        """
        return self.owner_of(self.living(name, session_id), name, version, session_id)

    def owner_of(
        self, living: tuple[ServedModel, Session] | None, name: str, version: str | None, session_id: str
    ) -> tuple[ServedModel, Session | None]:
        """`owner`, for a caller that has the result of `living`."""
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
            ModelChanged: The session lives on another version than the requested one.
            SessionError: It is not here; the class says what became of it.
        """
        served, session = self.owner(name, version, session_id)
        if session is None:
            raise served.scheduler.sessions.closed.error(session_id, self._clock.now())
        return served, session

    def check_free(self, name: str, session_id: str) -> None:
        """Raises SessionExists if a session of that id is open."""
        if (living := self.living(name, session_id)) is not None:
            raise SessionExists(f"session {shown(session_id)!r} is open", position=living[1].position)
        if (stranded := self.find_stranded(name, session_id)) is not None:
            raise SessionExists(f"session {shown(session_id)!r} is open", position=stranded.position)
