"""The statistics extension of the Open Inference Protocol, in the form that Triton's clients expect.

Beyond the protocol, it has `step_count` and the calls measured at load (`warm_up`, `best_batch_size`). Include this
router before the protocol's other routes, where `/v2/models/stats` would match a model named `stats`.
"""

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Response

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_responses
from unroll.service.api.schemas import TEXT, WHOLE, list_of, object_of
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json

_DURATION = object_of(count=WHOLE, ns=WHOLE)
_COMPUTE = dict.fromkeys(("compute_input", "compute_infer", "compute_output"), _DURATION)
_MODEL = object_of(
    name=TEXT,
    version=TEXT,
    last_inference=WHOLE | {"description": "milliseconds since 1970; 0 if there was none"},
    inference_count=WHOLE | {"description": "chunks and whole sequences answered"},
    execution_count=WHOLE | {"description": "calls of the model"},
    inference_stats=object_of(success=_DURATION, fail=_DURATION, queue=_DURATION, **_COMPUTE),
    batch_stats=list_of(object_of(batch_size=WHOLE, **_COMPUTE)),
    step_count=WHOLE | {"description": "time steps run"},
    warm_up=list_of(object_of(rows=WHOLE, steps=WHOLE, ns=WHOLE))
    | {"description": "calls of the model that were measured at load"},
    best_batch_size=WHOLE | {"description": "batch size with the lowest cost per single step"},
)
_SCHEMA = object_of(model_stats=list_of(_MODEL))
_OK: dict[int | str, dict[str, Any]] = {
    200: {"description": "Counts since each version was loaded.", "content": {"application/json": {"schema": _SCHEMA}}}
}
_OK_OR_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    **_OK,
    **open_inference_responses({404: "no such model", 503: "the model's bundle is refused"}),
}


def router(app: AppState) -> APIRouter:
    api = APIRouter(prefix="/v2/models", tags=["Open Inference Protocol v2"])

    def statistics(models: Iterable[ServedModel]) -> Response:
        wall = time.time()
        found = [{"name": served.name, "version": served.version, **served.figures.document(wall)} for served in models]
        return Response(json.dump({"model_stats": found}), media_type="application/json")

    @api.get("/stats", summary="Statistics of all models", response_model=dict[str, Any], responses=_OK)
    async def all_models() -> Any:
        return statistics(served for name in app.models.names() for served in app.models.available(name))

    @api.get(
        "/{model}/stats",
        summary="Statistics of a model's versions",
        response_model=dict[str, Any],
        responses=_OK_OR_NOT_FOUND,
    )
    async def all_versions(model: str) -> Any:
        return statistics(app.models.available(model))

    @api.get(
        "/{model}/versions/{version}/stats",
        summary="Statistics of a version",
        response_model=dict[str, Any],
        responses=_OK_OR_NOT_FOUND,
    )
    async def one_version(model: str, version: str) -> Any:
        return statistics([app.models.resolve(model, version)])

    return api
