"""Model configurations and the repository index, which Triton's tools read before they send requests."""

from typing import Any

from fastapi import APIRouter, Request

from unroll.bundle import TensorSpec
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_responses
from unroll.service.api.request import read_request
from unroll.service.api.schemas import FLAG, object_of
from unroll.service.core.errors import InvalidRequest
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol import json
from unroll.service.protocol.open_inference import DATATYPES

_TYPES = {datatype: f"TYPE_{datatype}" for datatype in DATATYPES.values()}

_NOT_FOUND = open_inference_responses({404: "no such model", 503: "the model's bundle is refused"})
_INDEX_BODY = {"requestBody": {"content": {"application/json": {"schema": object_of(ready=FLAG)}}}}


def router(app: AppState) -> APIRouter:
    api = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

    @api.get("/models/{model}/config", summary="Configuration of a model, as Triton has it", responses=_NOT_FOUND)
    async def config(model: str) -> dict[str, Any]:
        return _config(app.models.resolve(model))

    @api.get(
        "/models/{model}/versions/{version}/config",
        summary="Configuration of a version, as Triton has it",
        responses=_NOT_FOUND,
    )
    async def version_config(model: str, version: str) -> dict[str, Any]:
        return _config(app.models.resolve(model, version))

    @api.post(
        "/repository/index",
        summary="The models of the repository, refused ones included",
        responses=open_inference_responses({400: "the body is invalid", 413: "the body is too large"}),
        openapi_extra=_INDEX_BODY,
    )
    async def index(http: Request) -> list[dict[str, str]]:
        body = (await read_request(http.scope, http.receive, app.limits.max_json_bytes)).body
        only_ready = json.parse_object(body, app.limits.max_json_bytes).get("ready", False) if body else False
        if not isinstance(only_ready, bool):
            raise InvalidRequest("ready must be true or false")
        served = [(model.name, model.version) for name in app.models.names() for model in app.models.available(name)]
        ready = [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in served]
        refused = [
            {"name": name, "version": version, "state": "UNAVAILABLE", "reason": str(why)}
            for (name, version), why in app.models.problems().items()
            if (name, version) not in served
        ]
        unloaded = [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded by request"}
            for name in sorted(app.repository.unloaded)
        ]
        return ready if only_ready else ready + refused + unloaded

    return api


def _config(served: ServedModel) -> dict[str, Any]:
    manifest = served.manifest
    config: dict[str, Any] = {
        "name": served.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": served.codec.max_sequences,
        "input": [_tensor(spec) for spec in manifest.inputs],
        "output": [_tensor(spec) for spec in manifest.outputs],
    }
    idle = served.scheduler.sessions.limits.idle_timeout
    if manifest.streamable:
        config["sequence_batching"] = {"max_sequence_idle_microseconds": int((idle or 0) * 1e6)}
    return config


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    dims = [-1, *spec.shape] if spec.time else [*spec.shape]
    return {"name": spec.name, "data_type": _TYPES[DATATYPES[spec.dtype]], "dims": dims}
