"""The handles of one connection map to sessions and their model versions.

A handle always means the session that it was bound to, never a later session with the same id.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from unroll.service.api.app_state import AppState
from unroll.service.api.parameters import split_reference
from unroll.service.api.session_operations import start_of_static
from unroll.service.api.stream.messages import OpenSpec
from unroll.service.core.errors import (
    CapacityExhausted,
    InvalidRequest,
    ModelChanged,
    NeedsStoreLookup,
    SessionUnknown,
)
from unroll.service.core.session_ids import check_id, new_id, owned, shown
from unroll.service.models.served_model import ServedModel
from unroll.service.scheduler.closed_sessions import replaced
from unroll.service.scheduler.session import Life, Session

#: Maximum number of handles per connection.
MAX_HANDLES = 65_536


class Handles:
    """Opens, finds and closes the sessions of a connection.

    Args:
        model: `name` or `name:version`.
        served: The connection's first version. Sessions of other versions must have the same inputs and outputs.
        on_unbind: Called when a handle becomes free.

    Attributes:
        has_store: Opening and closing a session may suspend.
        by_model: Sessions by handle, by version.
    """

    def __init__(
        self, app: AppState, tenant: str, model: str, served: ServedModel, on_unbind: Callable[[], None]
    ) -> None:
        self._app = app
        self._tenant = tenant
        self._sessions = app.sessions
        self.has_store = app.sessions.has_store
        self._model = model
        self._name, self._version = split_reference(model)
        self._served = served
        self._on_unbind = on_unbind
        self.by_model: dict[ServedModel, dict[int, Session]] = {}
        self._count = 0
        self._opening: set[int] = set()  # handles of sessions that are being opened

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for bound in self.by_model.values():
            yield from bound

    def unbound(self, handles: list[int]) -> set[int]:
        """The handles without a session."""
        return {*handles}.difference(*self.by_model.values())

    def find(self, handle: int) -> tuple[ServedModel, Session] | None:
        """The session that was bound, even if it has ended since."""
        for served, bound in self.by_model.items():
            if (session := bound.get(handle)) is not None:
                return served, session
        return None

    def resolve(self, handle: int) -> tuple[ServedModel, Session]:
        """The session, detached from its cohort. A memory session has a row; a durable one may have lost its copy.

        Raises:
            InvalidRequest: No session is bound to the handle.
            SessionError: The memory session lost its row and has ended.
            NeedsStoreLookup: The memory session lost its row and may be in the store.
        """
        served, session = self._bound(handle)
        if session.life is Life.GONE and session.origin is not None and session.durable is None:
            return self.rebind(handle, session)
        return served, served.scheduler.sessions.detach_from_cohort(session)

    def rebind(self, handle: int, before: Session) -> tuple[ServedModel, Session]:
        """Bind the handle again after its session lost its row, restoring the session from host memory if necessary.

        Raises:
            NeedsStoreLookup: The session is durable or not here, and was not looked up for this call.
            SessionError: The session has ended.
        """
        if before.durable is not None:
            self._sessions.require_verified(self._name, before.id)
        stranded = self._sessions.directory.find_stranded(self._name, before.id)
        if stranded is not None and stranded.origin != before.origin:
            raise replaced(before.id)
        served, session = self._sessions.owner(self._name, None, before.id)
        if session is None:
            raise served.ended(before.id)
        if session.origin != before.origin:
            raise replaced(before.id)
        served.scheduler.set_retry_depth(session, before.depth)
        self.unbind(handle)
        self._bind(handle, served, session)
        return served, session

    async def open(self, spec: OpenSpec) -> tuple[ServedModel, Session]:
        """Open or resume a session and bind it. Suspends only with a store. Raises UnrollError."""
        handle = spec.handle
        if self.find(handle) is not None or handle in self._opening:
            raise InvalidRequest(f"handle {handle} is already bound to a session")
        if self._count + len(self._opening) >= MAX_HANDLES:
            raise CapacityExhausted(f"one connection has at most {MAX_HANDLES} handles: detach some, or use another")
        self._opening.add(handle)
        try:
            self._check_allowed(spec)
            found = None if spec.mode == "new" or spec.session_id is None else await self._find_existing(spec)
            if found is not None:
                served, session = found
                self._check_tensors(served)
            else:
                served = self._app.models.resolve(self._name, self._version)
                self._check_tensors(served)
                start = start_of_static(served, spec.static)
                durability = self._app.durability_of(spec.durability)
                session = await self._sessions.create(served, new_id(self._tenant, spec.session_id), start, durability)
        finally:
            self._opening.remove(handle)
        served.scheduler.set_retry_depth(session, spec.depth)
        self._bind(handle, served, session)
        return served, session

    async def close(self, handle: int) -> int:
        """Close the session, free the handle, and return the position. Suspends only if the session is in the store.

        Raises UnrollError.
        """
        try:
            closed = self._unbind_and_close(handle)
        except NeedsStoreLookup as needed:  # `verified` calls `close` in the same turn: the session keeps its row
            close = partial(self._unbind_and_close, handle)
            closed = await self._sessions.verified(self._name, needed.session_id, close)
        if closed.durable is None:
            return closed.position
        return (await self._sessions.close(self._name, None, closed.id, closed.origin))[1]

    def _unbind_and_close(self, handle: int) -> Session:
        """Free the handle and close the session, unless it is durable."""
        served, session = self.resolve(handle)
        self.unbind(handle)
        if session.durable is None:
            check_present(served, session)
            served.scheduler.close(session, served.loop.clock.now())
        return session

    def unbind(self, handle: int) -> None:
        """Free the handle; the session stays open."""
        for bound in self.by_model.values():
            if bound.pop(handle, None) is not None:
                self._count -= 1
                self._on_unbind()

    def describe_session(self, handle: int) -> dict[str, Any]:
        """The session's id and last known position. Raises UnrollError."""
        try:
            served, session = self.resolve(handle)
            if session.durable is None:
                check_present(served, session)
        except NeedsStoreLookup:
            _, session = self._bound(handle)
        return {"handle": handle, "session_id": shown(session.id), "position": session.position}

    def _bound(self, handle: int) -> tuple[ServedModel, Session]:
        found = self.find(handle)
        if found is None:
            raise InvalidRequest(f"no session is bound to handle {handle}")
        return found

    def _bind(self, handle: int, served: ServedModel, session: Session) -> None:
        self.by_model.setdefault(served, {})[handle] = session
        session.stream = id(self)
        self._count += 1

    def _check_allowed(self, spec: OpenSpec) -> None:
        self._app.refuse_if_draining()
        if spec.mode == "resume" and spec.session_id is None:
            raise InvalidRequest("mode 'resume' requires a session_id")
        if not self.has_store:
            self._app.durability_of(spec.durability)  # raises if a store is requested

    async def _find_existing(self, spec: OpenSpec) -> tuple[ServedModel, Session] | None:
        """The session to resume; None if there is none and `spec` permits a new one."""
        assert spec.session_id is not None
        session_id = owned(self._tenant, spec.session_id)
        check_id(session_id)
        try:
            return await self._sessions.find(self._name, self._version, session_id)
        except SessionUnknown:
            if spec.mode == "resume":
                raise
            return None

    def _check_tensors(self, served: ServedModel) -> None:
        """Raises ModelChanged unless the version has the inputs and outputs of this connection's frames."""
        manifest, own = served.manifest, self._served.manifest
        if manifest is not own and (manifest.inputs, manifest.outputs) != (own.inputs, own.outputs):
            raise ModelChanged(
                f"version {served.version} has other inputs or outputs than this connection's: "
                f"connect to {served.name}:{served.version}"
            )


def check_present(served: ServedModel, session: Session) -> None:
    """Raises SessionError if the session is no longer here."""
    if session.life is Life.LEAVING or session.life is Life.GONE:
        raise served.scheduler.sessions.ended(session, served.loop.clock.now())
