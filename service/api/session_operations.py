"""Opens and closes sessions over HTTP, from a request to an answer, and describes sessions in API form."""

from collections.abc import Coroutine
from typing import Any

import numpy as np

from unroll.service.api.app_state import AppState
from unroll.service.api.bodies import OpenSession, parse_body
from unroll.service.api.parameters import require_streamable, split_reference
from unroll.service.api.request import JSON, RAW, Answer, Request
from unroll.service.api.sealed_steps import base64_text, keys_of
from unroll.service.core.errors import InvalidRequest, InvalidShape, ModelChanged, NonFiniteInput
from unroll.service.core.session_ids import new_id, shown
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json
from unroll.service.scheduler.session import Session
from unroll.service.state.snapshot import Snapshot
from unroll.service.store.record import Record


def durability_of(session: Session) -> str:
    return "memory" if session.origin is None else session.origin.durability


def describe(served: ServedModel, session: Session) -> dict:
    return _description(served, session.id, session.position, durability_of(session))


def _description(served: ServedModel, session_id: str, position: int, durability: str) -> dict:
    return {
        "session_id": shown(session_id),
        "position": position,
        "model": served.name,
        "model_version": served.version,
        "model_digest": served.manifest.digest,
        "durability": durability,
        "idle_timeout": None if durability == "client" else served.scheduler.sessions.limits.idle_timeout,
    }


async def close_session(app: AppState, model: str, own_id: str) -> Answer:
    """Close a session, even if its version is not loaded here."""
    name, version = split_reference(model)
    closed, position = await app.sessions.close(name, version, own_id)
    if isinstance(closed, Record):
        origin = closed.origin
        described = _description(app.models.of(name)[0], own_id, position, origin.durability)
        described |= {"model_version": None, "model_digest": origin.model}
    else:
        described = describe(*closed) | {"position": position}
    return Answer(200, JSON, json.dump(described))


def open_session(app: AppState, model: str, request: Request) -> Coroutine[Any, Any, Answer]:
    """Read the request. The result opens the session; it waits only for the store."""
    if request.media_type == RAW:
        body = OpenSession.model_construct(snapshot=request.body)
    else:
        body = parse_body(OpenSession, request, app.limits.max_json_bytes)
    request.session = body.session_id
    return _open(app, request.tenant, model, body)


async def _open(app: AppState, tenant: str, model: str, body: OpenSession) -> Answer:
    """Open a session that the server keeps, or with durability `client`, seal its first snapshot."""
    keys = keys_of(app) if body.durability == "client" else None
    served = _version_of(app, model, body)
    require_streamable(served)
    app.refuse_if_draining()
    start, new = _start_of(served, body), new_id(tenant, body.session_id)
    if keys is None:
        session = await app.sessions.create(served, new, start, app.durability_of(body.durability))
        return Answer(201, JSON, json.dump(describe(served, session)))
    start = start or Snapshot(served.manifest.digest, 0, served.manifest.initial_row())
    described = _description(served, new.id, start.position, "client")
    return Answer(201, JSON, json.dump({**described, "snapshot": base64_text(keys.seal(new.id, start))}))


def _version_of(app: AppState, model: str, body: OpenSession) -> ServedModel:
    """The version of a new session: the snapshot's, else the requested one, else the current one."""
    name, version = split_reference(model)
    app.models.available(name)
    if sum(given is not None for given in (body.state, body.snapshot, body.static)) > 1:
        raise InvalidRequest("a session begins from a state, a snapshot or static inputs, not from several of them")
    if body.snapshot is None:
        return app.models.resolve(name, version)
    served = app.models.of_snapshot(name, version, Snapshot.checked_model_of(body.snapshot))
    if served.retired:
        raise ModelChanged(f"the snapshot was taken from version {served.version} of {name!r}, which is retired")
    return served


def _start_of(served: ServedModel, body: OpenSession) -> Snapshot | None:
    """The snapshot from which a new session starts; None for the model's initial state."""
    if body.snapshot is not None:
        return served.read_snapshot(body.snapshot)
    return start_of_static(served, body.static) if body.state is None else _from_state(served, body.state)


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
