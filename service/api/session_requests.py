"""Opens and closes sessions over HTTP: from a request to an answer, without a framework."""

from collections.abc import Coroutine
from typing import Any

from unroll.service.api import session_operations
from unroll.service.api.app_state import AppState
from unroll.service.api.bodies import OpenSession, parse_body
from unroll.service.api.request import JSON, RAW, Answer, Request
from unroll.service.api.sealed_steps import base64_text
from unroll.service.protocol import json


def open_session(app: AppState, model: str, request: Request) -> Coroutine[Any, Any, Answer]:
    """Read the request. The result opens the session; it waits only for the store."""
    if request.media_type == RAW:
        body = OpenSession.model_construct(snapshot=request.body)
    else:
        body = parse_body(OpenSession, request, app.limits.max_json_bytes)
    request.session = body.session_id
    return _open(app, request.tenant, model, body)


async def _open(app: AppState, tenant: str, model: str, body: OpenSession) -> Answer:
    start = session_operations.Start(state=body.state, snapshot=body.snapshot, static=body.static)
    ids = tenant, model, body.session_id
    if body.durability == "client":
        described, sealed = session_operations.open_sealed(app, *ids, **start)
        return Answer(201, JSON, json.dump({**described, "snapshot": base64_text(sealed)}))
    opened = await session_operations.open_session(app, *ids, durability=body.durability, **start)
    return Answer(201, JSON, json.dump(session_operations.describe(*opened)))


async def close_session(app: AppState, model: str, own_id: str) -> Answer:
    return Answer(200, JSON, json.dump(await session_operations.close_session(app, model, own_id)))
