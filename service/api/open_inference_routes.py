"""The Open Inference Protocol, v2, as FastAPI routes. The transport answers most infer calls, which bypass them."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from unroll.bundle import TensorSpec
from unroll.service.api import inference_routes
from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_responses
from unroll.service.api.http_methods import add_probe
from unroll.service.api.schemas import FLAG, TEXT, WHOLE, list_of, object_of
from unroll.service.models.served_model import ServedModel
from unroll.service.protocol.open_inference import DATATYPES

EXTENSIONS = ["sequence", "sequence(string_id)", "binary_tensor_data", "statistics"]

_ERRORS = open_inference_responses(
    {
        400: "malformed, or a sequence that was not started",
        404: "no such model",
        409: "a position or version conflict; the state is unchanged",
        410: "the sequence ended, expired or was evicted",
        413: "too large",
        422: "a shape, type or value that the model does not accept; the state is unchanged",
        429: "the tenant's quota is used up: retry after Retry-After seconds",
        500: "the model failed on this input; the state is unchanged",
        503: "the model's bundle is refused; or no room now: retry after Retry-After seconds",
        504: "the deadline passed before the work started",
    }
)

_TENSOR = object_of(
    name=TEXT,
    shape=list_of(WHOLE) | {"description": "[batch, time, features...]"},
    datatype=TEXT | {"enum": sorted(DATATYPES.values())},
    parameters=object_of(binary_data_size=WHOLE),
    data=list_of({}) | {"description": "nested or flat, row-major"},
) | {"required": ["name", "shape", "datatype"]}
_PARAMETERS = object_of(
    sequence_id={"anyOf": [WHOLE, TEXT]},
    sequence_start=FLAG,
    sequence_end=FLAG,
    sequence_position=WHOLE | {"description": "the sequence's position as the client expects it"},
    binary_data_output=FLAG,
    timeout=WHOLE | {"description": "microseconds within which the work must start"},
)
_OUTPUT = object_of(name=TEXT, parameters={"type": "object"}) | {"required": ["name"]}
_REQUEST = object_of(id=TEXT, parameters=_PARAMETERS, inputs=list_of(_TENSOR), outputs=list_of(_OUTPUT))
_ANSWER = object_of(model_name=TEXT, model_version=TEXT, id=TEXT, parameters=_PARAMETERS, outputs=list_of(_TENSOR))
_INFER: dict[str, Any] = {
    "responses": {
        200: {
            "description": "The outputs; binary tensors follow the JSON.",
            "content": {"application/json": {"schema": _ANSWER}, "application/octet-stream": {}},
        },
        **_ERRORS,
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _REQUEST | {"required": ["inputs"]}},
                "application/octet-stream": {},
            },
        },
        "parameters": [
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "required": False,
                "schema": WHOLE | {"minimum": 0},
                "description": "length of the JSON when tensors follow it",
            }
        ],
    },
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (404, 503)}


def router(app: AppState, version: str) -> APIRouter:
    api = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

    @api.get("", summary="Server metadata")
    async def metadata() -> dict[str, Any]:
        return {"name": "unroll", "version": version, "extensions": EXTENSIONS}

    @api.get("/models/{model}", summary="Model metadata", responses=_NOT_FOUND)
    async def model_metadata(model: str) -> dict[str, Any]:
        return _metadata(app, app.models.resolve(model))

    @api.get("/models/{model}/versions/{version}", summary="Model metadata of a version", responses=_NOT_FOUND)
    async def version_metadata(model: str, version: str) -> dict[str, Any]:
        return _metadata(app, app.models.resolve(model, version))

    async def model_ready(model: str) -> dict[str, Any]:
        return {"name": app.models.resolve(model).name, "ready": True}

    async def version_ready(model: str, version: str) -> dict[str, Any]:
        return {"name": app.models.resolve(model, version).name, "ready": True}

    of_model, of_version = "/models/{model}/ready", "/models/{model}/versions/{version}/ready"
    add_probe(api, of_model, model_ready, summary="Readiness of a model", responses=_NOT_FOUND)
    add_probe(api, of_version, version_ready, summary="Readiness of a version", responses=_NOT_FOUND)

    @api.post("/models/{model}/infer", summary="Infer: whole sequences, or steps of a sequence", **_INFER)
    async def infer(model: str, http: HttpRequest) -> Response:
        return await inference_routes.respond(app, http)

    @api.post("/models/{model}/versions/{version}/infer", summary="Infer on a version", **_INFER)
    async def version_infer(model: str, version: str, http: HttpRequest) -> Response:
        return await inference_routes.respond(app, http)

    return api


def _metadata(app: AppState, served: ServedModel) -> dict[str, Any]:
    return {
        "name": served.name,
        "versions": [model.version for model in app.models.available(served.name)],
        "platform": "onnxruntime_onnx",
        "inputs": [_tensor(spec) for spec in served.manifest.inputs],
        "outputs": [_tensor(spec) for spec in served.manifest.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "datatype": DATATYPES[spec.dtype],
        "shape": [-1, -1, *spec.shape] if spec.time else [-1, *spec.shape],
    }
