"""The native API, v1, as FastAPI routes. The transport answers most steps and sequences, which bypass them."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from unroll.service.api import inference_routes
from unroll.service.api.admission import OwnId, tenant_of
from unroll.service.api.app_state import AppState
from unroll.service.api.bodies import (
    ForkSession,
    HeldSession,
    ModelInfo,
    OpenSession,
    Problem,
    Sequences,
    SequencesReply,
    SessionInfo,
    StateSlot,
    StaticTensor,
    Steps,
    StepsReply,
    Tensor,
    parse_body,
)
from unroll.service.api.error_responses import problems
from unroll.service.api.parameters import split_reference
from unroll.service.api.request import RAW, read_request
from unroll.service.api.rollout import RolloutRequest
from unroll.service.api.session_operations import describe
from unroll.service.core.errors import UnsupportedMediaType
from unroll.service.core.session_ids import new_id
from unroll.service.models.served_model import ServedModel

_RAW_SCHEMA = {"schema": {"type": "string", "format": "binary"}}


def _bodies(json_model: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/octet-stream": _RAW_SCHEMA}
    if json_model is not None:
        content["application/json"] = {"schema": {"$ref": f"#/components/schemas/{json_model}"}}
    return {"requestBody": {"content": content, "required": json_model != "OpenSession"}}


def _header(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "schema": {"type": "integer", "minimum": 0},
        "description": description,
    }


TIMEOUT_HEADER = _header("Unroll-Timeout-Ms", "milliseconds within which the work must start")
POSITION_HEADER = _header(
    "Unroll-Position", "the session's position as the client expects it; JSON bodies may have it as `position`"
)
_STEPS = _header(
    "Unroll-Steps", "time steps in a raw body: required for a sequence; 1 if absent for the steps of a session"
)


def router(app: AppState) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["native v1"])
    _add_models(api, app)
    _add_inference(api, app)
    _add_sessions(api, app)
    _add_states(api, app)
    return api


def _add_models(api: APIRouter, app: AppState) -> None:
    @api.get("/models", summary="The models, current version of each")
    async def models(http: HttpRequest) -> list[ModelInfo]:
        current = [app.models.resolve(name) for name in app.models.names() if app.models.has_current(name)]
        return [_describe(app, served, tenant_of(http)) for served in current]

    @api.get("/models/{model}", summary="One model: `name` or `name:version`", responses=problems(404, 503))
    async def model(model: str, http: HttpRequest) -> ModelInfo:
        return _describe(app, app.models.resolve(*split_reference(model)), tenant_of(http))


def _add_inference(api: APIRouter, app: AppState) -> None:
    @api.post(
        "/models/{model}/sequences",
        summary="Whole sequences, each from the initial state",
        response_model=SequencesReply,
        responses=problems(400, 404, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={**_bodies("Sequences"), "parameters": [_STEPS, TIMEOUT_HEADER]},
    )
    async def sequences(model: str, http: HttpRequest) -> Response:
        return await inference_routes.respond(app, http)

    @api.post(
        "/models/{model}/sessions/{session_id:segment}/steps",
        summary="The next T >= 1 time steps of a session",
        response_model=StepsReply,
        responses=problems(400, 404, 409, 410, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={**_bodies("Steps"), "parameters": [POSITION_HEADER, _STEPS, TIMEOUT_HEADER]},
    )
    async def steps(model: str, session_id: str, http: HttpRequest) -> Response:
        return await inference_routes.respond(app, http)


def _add_sessions(api: APIRouter, app: AppState) -> None:
    limits = app.limits

    @api.post(
        "/models/{model}/sessions",
        summary="Open a session; a raw body is its initial snapshot",
        status_code=201,
        response_model=SessionInfo | HeldSession,
        responses=problems(400, 404, 409, 413, 415, 422, 429, 503),
        openapi_extra=_bodies("OpenSession"),
    )
    async def open_session(model: str, http: HttpRequest) -> Response:
        return await inference_routes.respond(app, http)

    @api.get(
        "/models/{model}/sessions/{session_id:segment}",
        summary="A session and its position",
        responses=problems(404, 409, 410, 503),
    )
    async def session(model: str, own_id: OwnId) -> SessionInfo:
        return _info(*await app.sessions.find(*split_reference(model), own_id))

    @api.delete(
        "/models/{model}/sessions/{session_id:segment}",
        summary="Close a session; running steps finish, waiting steps fail",
        response_model=SessionInfo,
        responses=problems(404, 409, 410, 503),
    )
    async def close(model: str, session_id: str, http: HttpRequest) -> Response:
        return await inference_routes.respond(app, http)

    @api.post(
        "/models/{model}/sessions/{session_id:segment}/fork",
        summary="A second session that continues from the same state",
        status_code=201,
        responses=problems(400, 404, 409, 410, 413, 415, 429, 503),
        openapi_extra={
            "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ForkSession"}}}}
        },
    )
    async def fork(model: str, own_id: OwnId, http: HttpRequest) -> SessionInfo:
        body = parse_body(
            ForkSession, await read_request(http.scope, http.receive, limits.max_body_bytes), limits.max_json_bytes
        )
        app.refuse_if_draining()
        new = new_id(tenant_of(http), body.session_id)
        return _info(*await app.sessions.fork(*split_reference(model), own_id, new))


def _add_states(api: APIRouter, app: AppState) -> None:
    @api.get(
        "/models/{model}/sessions/{session_id:segment}/state",
        summary="A snapshot: versioned, bound to the model, checksummed",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": _RAW_SCHEMA}}, **problems(404, 409, 410, 503)},
    )
    async def save(model: str, own_id: OwnId) -> Response:
        snapshot = await app.sessions.save(*split_reference(model), own_id)
        headers = {"Unroll-Position": str(snapshot.position)}
        return Response(snapshot.to_bytes(), headers=headers, media_type=RAW.decode())

    @api.put(
        "/models/{model}/sessions/{session_id:segment}/state",
        summary="Return a session to the state of a snapshot",
        responses=problems(404, 409, 410, 413, 415, 422, 503),
        openapi_extra=_bodies(None),
    )
    async def restore(model: str, own_id: OwnId, http: HttpRequest) -> SessionInfo:
        request = await read_request(http.scope, http.receive, app.limits.max_body_bytes)
        if request.media_type != RAW:
            raise UnsupportedMediaType("send the snapshot as application/octet-stream")
        return _info(*await app.sessions.restore(*split_reference(model), own_id, request.body))


#: Bodies that only the OpenAPI document references.
DOCUMENTED = (Steps, Sequences, OpenSession, ForkSession, RolloutRequest, Problem)


def _info(served: ServedModel, session: Any) -> SessionInfo:
    return SessionInfo(**describe(served, session))


def _describe(app: AppState, served: ServedModel, tenant: str) -> ModelInfo:
    manifest = served.manifest
    rates = manifest.rates
    tensors = [
        [Tensor(**asdict(t) | {"shape": list(t.shape), "rate": rates.get(t.name)}) for t in group]
        for group in (manifest.inputs, manifest.outputs)
    ]
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        versions=[model.version for model in app.models.available(served.name)],
        current_version=app.models.current.get(served.name),
        digest=manifest.digest,
        inputs=tensors[0],
        outputs=tensors[1],
        static=[StaticTensor(name=s.name, dtype=s.dtype, shape=list(s.shape)) for s in manifest.static],
        state_size=manifest.state_size,
        state=[StateSlot(**asdict(slot)) for slot in manifest.state],
        bundle_bytes=served.bundle.nbytes,
        streamable=manifest.streamable,
        not_streamable_because=manifest.not_streamable_because,
        bit_exact=manifest.bit_exact,
        device=served.serving.device,
        provider=served.serving.provider,
        precision=served.serving.precision,
        parity=served.serving.parity,
        tolerance={entry.output: entry.tolerance for entry in manifest.parity},
        stability=served.serving.stability,
        sessions=app.models.open_sessions(served.name, served.version, tenant),
    )
