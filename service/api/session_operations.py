"""Opens, forks and closes sessions for API requests, and describes sessions in API form."""

from typing import TypedDict, Unpack

import numpy as np

from unroll.service.api.app_state import AppState
from unroll.service.api.parameters import require_streamable, split_reference
from unroll.service.api.sealed_steps import keys_of
from unroll.service.core.errors import InvalidRequest, InvalidShape, ModelChanged, NonFiniteInput
from unroll.service.core.session_ids import new_id, shown
from unroll.service.models.served_model import ServedModel
from unroll.service.scheduler.session import Session
from unroll.service.state.snapshot import Snapshot
from unroll.service.store.record import Record


class Start(TypedDict, total=False):
    """The start of a session: at most one of these; the default is the model's initial state."""

    state: list[float] | None
    snapshot: bytes | None
    static: dict | None


def durability_of(session: Session) -> str:
    return "memory" if session.origin is None else session.origin.durability


def describe(served: ServedModel, session: Session) -> dict:
    idle_timeout = served.scheduler.sessions.limits.idle_timeout
    return _description(served, session.id, session.position, durability_of(session), idle_timeout)


def _description(
    served: ServedModel, session_id: str, position: int, durability: str, idle_timeout: float | None
) -> dict:
    return {
        "session_id": shown(session_id),
        "position": position,
        "model": served.name,
        "model_version": served.version,
        "model_digest": served.manifest.digest,
        "durability": durability,
        "idle_timeout": idle_timeout,
    }


async def close_session(app: AppState, model: str, session_id: str) -> dict:
    """Close a session, even if its version is not loaded here. Returns its description."""
    name, version = split_reference(model)
    closed, position = await app.sessions.close(name, version, session_id)
    if not isinstance(closed, Record):
        return describe(*closed) | {"position": position}
    other = app.models.of(name)[0]
    idle_timeout = other.scheduler.sessions.limits.idle_timeout
    described = _description(other, session_id, position, closed.origin.durability, idle_timeout)
    return described | {"model_version": None, "model_digest": closed.origin.model}


async def open_session(
    app: AppState,
    tenant: str,
    model: str,
    session_id: str | None,
    *,
    durability: str | None = None,
    **start: Unpack[Start],
) -> tuple[ServedModel, Session]:
    """Open a session that the server keeps."""
    served = _version_of(app, model, **start)
    require_streamable(served)
    app.refuse_if_draining()
    first = start_of(served, **start)
    return served, await app.sessions.create(served, new_id(tenant, session_id), first, app.durability_of(durability))


async def fork(
    app: AppState, tenant: str, model: str, session_id: str, fork_id: str | None
) -> tuple[ServedModel, Session]:
    """Fork a session. session_id: internal id. fork_id: the client's id."""
    app.refuse_if_draining()
    return await app.sessions.fork(*split_reference(model), session_id, new_id(tenant, fork_id))


def open_sealed(
    app: AppState, tenant: str, model: str, session_id: str | None, **start: Unpack[Start]
) -> tuple[dict, bytes]:
    """Open a client-held session. Returns its description and its first sealed snapshot."""
    keys = keys_of(app)
    app.refuse_if_draining()
    served = _version_of(app, model, **start)
    require_streamable(served)
    first = start_of(served, **start) or Snapshot(served.manifest.digest, 0, served.manifest.initial_row())
    session_id = new_id(tenant, session_id).id
    return _description(served, session_id, first.position, "client", None), keys.seal(session_id, first)


def _version_of(app: AppState, model: str, **start: Unpack[Start]) -> ServedModel:
    """The version of a new session: the snapshot's, else the requested one, else the current one."""
    name, version = split_reference(model)
    app.models.available(name)
    if sum(given is not None for given in start.values()) > 1:
        raise InvalidRequest("a session begins from a state, a snapshot or static inputs, not from several of them")
    if (snapshot := start.get("snapshot")) is None:
        return app.models.resolve(name, version)
    served = app.models.of_snapshot(name, version, Snapshot.checked_model_of(snapshot))
    if served.retired:
        raise ModelChanged(f"the snapshot was taken from version {served.version} of {name!r}, which is retired")
    return served


def start_of(served: ServedModel, **start: Unpack[Start]) -> Snapshot | None:
    """The snapshot from which a new session starts; None for the model's initial state."""
    if (snapshot := start.get("snapshot")) is not None:
        return served.read_snapshot(snapshot)
    if (state := start.get("state")) is not None:
        return _from_state(served, state)
    return start_of_static(served, start.get("static"))


def start_of_static(served: ServedModel, static: dict | None) -> Snapshot | None:
    """The snapshot from which a session with these static inputs starts; None for the model's initial state."""
    row = served.codec.initial_row(static)
    return None if row is None else Snapshot(served.manifest.digest, 0, row)


def _from_state(served: ServedModel, state: list[float]) -> Snapshot:
    size = served.manifest.state_size
    if len(state) != size:
        raise InvalidShape(f"the state row of {served.name!r} has {size} values, not {len(state)}")
    with np.errstate(over="ignore"):
        row = np.array(state, np.float32)
    if not np.isfinite(row).all():
        raise NonFiniteInput("the state contains NaN, infinity or a value too large for float32")
    return Snapshot(served.manifest.digest, 0, row)
