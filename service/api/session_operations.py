"""Opening, forking, saving, restoring and closing sessions: what the native API does besides steps."""

import re
import secrets
from collections.abc import Awaitable, Callable
from typing import TypedDict, TypeVar, Unpack

import numpy as np

from unroll.service.api.app_state import AppState
from unroll.service.api.parameters import require_streamable, split_reference
from unroll.service.api.sealed_steps import keys_of
from unroll.service.catalog.keeper import Keeper
from unroll.service.catalog.model import ServedModel
from unroll.service.core.errors import (
    DurabilityUnavailable,
    InvalidRequest,
    InvalidShape,
    NonFiniteInput,
    SessionExists,
)
from unroll.service.scheduler.session import Session
from unroll.service.state.slots import INITIAL
from unroll.service.state.snapshot import Snapshot

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9._~:-]{1,128}")

#: Random bytes in an id made here: 128 bits.
_ID_BYTES = 16


class Beginning(TypedDict, total=False):
    """What a session begins from, one of these at most; without any, from the model's initial state."""

    state: list[float] | None
    snapshot: bytes | None
    static: dict | None


def check_id(session_id: str) -> None:
    """Raises InvalidRequest unless the id is safe in a URL and in a log."""
    if not _ID.fullmatch(session_id):
        raise InvalidRequest("a session id has 1 to 128 letters, digits or . _ ~ : -")


def describe(served: ServedModel, session: Session) -> dict:
    limits = served.scheduler.sessions.limits
    durability = "memory" if session.origin is None else session.origin.durability
    return {
        "session_id": session.id,
        "position": session.position,
        "model": served.name,
        "model_version": served.version,
        "model_digest": served.manifest.digest,
        "durability": durability,
        "idle_timeout": limits.idle_timeout,
    }


async def open_session(
    app: AppState,
    model: str,
    session_id: str | None,
    *,
    durability: str | None = None,
    **beginning: Unpack[Beginning],
) -> tuple[ServedModel, Session]:
    """A new session, which the server keeps."""
    name, version = split_reference(model)
    served = app.catalog.resolve(name, version)
    require_streamable(served)
    app.refuse_if_draining()
    start = start_of(served, **beginning)
    position = start.position if start else 0
    keeper = keeper_for(app, durability)
    if keeper is not None:
        wanted = await _looked_up(app, name, session_id, lambda: new_id(app, name, session_id))
        return served, await keeper.create(served, wanted, position, _row_of(start))
    return served, await _looked_up(app, name, session_id, lambda: begin(served, new_id(app, name, session_id), start))


def begin(served: ServedModel, session_id: str, start: Snapshot | None) -> Session:
    """A new memory session, from there or from the model's initial state."""
    now = served.loop.clock.now()
    session = served.scheduler.open(session_id, now, position=start.position if start else 0)
    if start is not None:
        _restore(served, session, start)
    return session


def hold(
    app: AppState,
    model: str,
    session_id: str | None,
    **beginning: Unpack[Beginning],
) -> tuple[dict, bytes]:
    """A session that its client holds: what it is, and the sealed snapshot to begin with."""
    keys = keys_of(app)
    app.refuse_if_draining()
    served = app.catalog.resolve(*split_reference(model))
    require_streamable(served)
    start = start_of(served, **beginning) or Snapshot(served.manifest.digest, 0, served.manifest.initial_row())
    if session_id is not None:
        check_id(session_id)
    session_id = session_id or secrets.token_urlsafe(_ID_BYTES)
    described = {
        "session_id": session_id,
        "position": start.position,
        "model": served.name,
        "model_version": served.version,
        "model_digest": served.manifest.digest,
        "durability": "client",
        "idle_timeout": None,
    }
    return described, keys.seal(session_id, start)


def keeper_for(app: AppState, durability: str | None) -> Keeper | None:
    """Who keeps a new session of that durability, or of the server's own; None: nobody but the process.

    Raises DurabilityUnavailable.
    """
    durability = durability or app.durability
    if durability == "memory" and app.shared_port is not None:
        raise DurabilityUnavailable(
            "there are several workers, and a session in the memory of one is unknown to the rest"
        )
    if durability == "memory":
        return None
    if app.catalog.keeper is None:
        raise DurabilityUnavailable("this server has no store: durability redis needs --store")
    return app.catalog.keeper


async def _looked_up(app: AppState, name: str, session_id: str | None, do: Callable[[], T]) -> T:
    """`do()` in the moment in which what is known of the session here is what the store knows, if there is one.

    A moment later it may have lost its row to another session.
    """
    if app.catalog.keeper is None or session_id is None:
        return do()
    return await app.catalog.keeper.look_up(name, session_id, do)


async def _at(app: AppState, model: str, session_id: str, do: Callable[[ServedModel, Session], T]) -> T:
    """The same with a living session, and where it is."""
    return await _looked_up(app, split_reference(model)[0], session_id, lambda: do(*find_here(app, model, session_id)))


async def find(app: AppState, model: str, session_id: str) -> tuple[ServedModel, Session]:
    return await _at(app, model, session_id, lambda served, session: (served, session))


def find_here(app: AppState, model: str, session_id: str) -> tuple[ServedModel, Session]:
    """The session as this process knows it, without a lookup in the store."""
    served, session = app.catalog.owner_here(*split_reference(model), session_id)
    if session is None:
        raise served.scheduler.sessions.closed.error(session_id, served.loop.clock.now())
    return served, session


async def fork(app: AppState, model: str, session_id: str, wanted_id: str | None) -> tuple[ServedModel, Session]:
    """A second session that goes on from where the first is, after the work accepted so far."""
    app.refuse_if_draining()

    def begin_fork(served: ServedModel, session: Session) -> tuple[ServedModel, Awaitable[Session | Snapshot]]:
        if session.durable is not None:
            return served, _save(served, session)
        return served, served.loop.act(session, lambda session: _copy(app, served, session, wanted_id))

    served, forking = await _at(app, model, session_id, begin_fork)
    forked = await forking
    if isinstance(forked, Session):
        return served, forked
    durability = app.catalog.store.durability if app.catalog.store is not None else None
    keeper, name = keeper_for(app, durability), served.name
    assert keeper is not None
    forked_id = await _looked_up(app, name, wanted_id, lambda: new_id(app, name, wanted_id))
    return served, await keeper.create(served, forked_id, forked.position, _row_of(forked))


def _copy(app: AppState, served: ServedModel, session: Session, wanted_id: str | None) -> Session:
    forked_id = new_id(app, served.name, wanted_id)
    forked = served.scheduler.open(forked_id, served.loop.clock.now(), position=session.position)
    if session.source != INITIAL:
        served.engine.copy(session.source, forked.slot)
        forked.source = forked.slot
    return forked


async def save(app: AppState, model: str, session_id: str) -> Snapshot:
    return await (await _at(app, model, session_id, _save))


def _save(served: ServedModel, session: Session) -> Awaitable[Snapshot]:
    def read(session: Session) -> Snapshot:
        return Snapshot(served.manifest.digest, session.position, served.engine.read(session.source))

    return served.loop.act(session, read)


async def restore(app: AppState, model: str, session_id: str, content: bytes) -> tuple[ServedModel, Session]:
    """Put a living session where the snapshot was taken."""

    def begin_put(served: ServedModel, session: Session) -> tuple[ServedModel, Awaitable[Session]]:
        snapshot = _snapshot(served, content)
        if app.catalog.keeper is not None and session.durable is not None:
            return served, app.catalog.keeper.put(served, session, snapshot)

        def write(session: Session) -> Session:
            _restore(served, session, snapshot)
            session.forget_applied()  # they belong to another past
            return session

        return served, served.loop.act(session, write)

    served, putting = await _at(app, model, session_id, begin_put)
    return served, await putting


async def close(app: AppState, model: str, session_id: str) -> tuple[ServedModel, Session]:
    def begin_close(served: ServedModel, session: Session) -> tuple[ServedModel, Session]:
        if session.durable is None:
            served.scheduler.close(session, served.loop.clock.now())
        return served, session

    served, session = await _at(app, model, session_id, begin_close)
    if app.catalog.keeper is not None and session.durable is not None:
        await app.catalog.keeper.close(served, session)
    return served, session


def start_of(served: ServedModel, **beginning: Unpack[Beginning]) -> Snapshot | None:
    """What a new session begins from, if that is not the model's initial state."""
    if sum(given is not None for given in beginning.values()) > 1:
        raise InvalidRequest("a session begins from a state, from a snapshot or from static inputs, not from several")
    if (snapshot := beginning.get("snapshot")) is not None:
        return _snapshot(served, snapshot)
    if (state := beginning.get("state")) is not None:
        return _state(served, state)
    row = served.codec.initial_row(beginning.get("static"))
    return None if row is None else Snapshot(served.manifest.digest, 0, row)


def _row_of(snapshot: Snapshot | None) -> bytes:
    return b"" if snapshot is None else snapshot.row.astype("<f4").tobytes()


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


def new_id(app: AppState, name: str, session_id: str | None) -> str:
    """The id asked for, if no version has a living session of it; one made here if none was asked for."""
    if session_id is None:
        return secrets.token_urlsafe(_ID_BYTES)
    check_id(session_id)
    if (found := app.catalog.living(name, session_id)) is not None:
        raise SessionExists(f"session {session_id!r} is open", position=found[1].position)
    return session_id
