"""Opening, forking, saving, restoring and closing sessions: what the native API does besides steps."""

import re
import secrets

import numpy as np

from service.api.server import Server
from service.api.steps import require_streamable, split_reference
from service.catalog.model import ServedModel
from service.core.errors import InvalidRequest, InvalidShape, NonFiniteInput, SessionExists
from service.scheduler.work import Session
from service.state.slots import INITIAL
from service.state.snapshot import Snapshot

_ID = re.compile(r"[A-Za-z0-9._~:-]{1,128}")

#: Random bytes in an id made here: 128 bits.
_ID_BYTES = 16


def check_id(session_id: str) -> None:
    """Raises InvalidRequest unless the id is safe in a URL and in a log."""
    if not _ID.fullmatch(session_id):
        raise InvalidRequest("a session id has 1 to 128 letters, digits or . _ ~ : -")


def describe(served: ServedModel, session: Session) -> dict:
    limits = served.scheduler.sessions.limits
    return {
        "session_id": session.id,
        "position": session.position,
        "model": served.name,
        "model_version": served.version,
        "model_digest": served.manifest.digest,
        "durability": served.loop.store.durability,
        "idle_timeout": limits.idle_timeout,
    }


async def open_session(
    server: Server,
    model: str,
    session_id: str | None,
    *,
    state: list[float] | None = None,
    snapshot: bytes | None = None,
) -> tuple[ServedModel, Session]:
    """A new session: from the model's initial state, a state row, or a snapshot with its position."""
    name, version = split_reference(model)
    served = server.catalog.resolve(name, version)
    require_streamable(served)
    server.refuse_if_draining()
    if state is not None and snapshot is not None:
        raise InvalidRequest("a session begins from a state or from a snapshot, not from both")
    start = (
        _snapshot(served, snapshot) if snapshot is not None else _state(served, state) if state is not None else None
    )
    session_id = new_id(server, name, session_id)
    session = served.scheduler.open(session_id, served.loop.clock.now(), position=start.position if start else 0)
    if start is not None:
        await served.loop.act(session_id, lambda session: _restore(served, session, start))
    return served, session


async def fork(server: Server, model: str, session_id: str, wanted_id: str | None) -> tuple[ServedModel, Session]:
    """A second session that goes on from where the first is, after the work accepted so far."""
    server.refuse_if_draining()
    served = owner(server, model, session_id)

    def copy(session: Session) -> Session:
        forked_id = new_id(server, served.name, wanted_id)
        forked = served.scheduler.open(forked_id, served.loop.clock.now(), position=session.position)
        if session.source != INITIAL:
            served.engine.copy(session.source, forked.slot)
            forked.source = forked.slot
        return forked

    return served, await served.loop.act(session_id, copy)


async def save(server: Server, model: str, session_id: str) -> Snapshot:
    served = owner(server, model, session_id)

    def read(session: Session) -> Snapshot:
        return Snapshot(served.manifest.digest, session.position, served.engine.read(session.source))

    return await served.loop.act(session_id, read)


async def restore(server: Server, model: str, session_id: str, content: bytes) -> tuple[ServedModel, Session]:
    """Put a living session where the snapshot was taken."""
    served = owner(server, model, session_id)
    snapshot = _snapshot(served, content)

    def write(session: Session) -> Session:
        _restore(served, session, snapshot)
        session.forget_applied()  # they belong to another past
        return session

    return served, await served.loop.act(session_id, write)


def close(server: Server, model: str, session_id: str) -> tuple[ServedModel, Session]:
    served = owner(server, model, session_id)
    return served, served.scheduler.close(session_id, served.loop.clock.now())


def find(server: Server, model: str, session_id: str) -> tuple[ServedModel, Session]:
    served = owner(server, model, session_id)
    return served, served.scheduler.sessions.find(session_id, served.loop.clock.now())


def owner(server: Server, model: str, session_id: str) -> ServedModel:
    return server.catalog.owner(*split_reference(model), session_id)


def _restore(served: ServedModel, session: Session, snapshot: Snapshot) -> None:
    served.engine.write(session.slot, snapshot.row)
    session.source = session.slot
    session.position = snapshot.position


def _snapshot(served: ServedModel, content: bytes) -> Snapshot:
    return Snapshot.from_bytes(content, digest=served.manifest.digest, state_size=served.manifest.state_size)


def _state(served: ServedModel, state: list[float]) -> Snapshot:
    size = served.manifest.state_size
    if len(state) != size:
        raise InvalidShape(f"the state row of {served.name!r} has {size} values, not {len(state)}")
    with np.errstate(over="ignore"):
        row = np.array(state, np.float32)
    if not np.isfinite(row).all():
        raise NonFiniteInput("the state holds NaN, infinity or a value too large for float32")
    return Snapshot(served.manifest.digest, 0, row)


def new_id(server: Server, name: str, session_id: str | None) -> str:
    """The id asked for, if no version has a living session of it; one made here if none was asked for."""
    if session_id is None:
        return secrets.token_urlsafe(_ID_BYTES)
    check_id(session_id)
    if (living := server.catalog.living(name, session_id)) is not None:
        session = living.scheduler.sessions.find(session_id, living.loop.clock.now())
        raise SessionExists(f"session {session_id!r} is open", position=session.position)
    return session_id
