"""Health, metrics and the OpenAPI document."""

import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import wire
from serving import Running, Serve, metric, metrics, raw_steps

from unroll.service.api import (
    health_routes,
    inference_routes,
    native_routes,
    open_inference_routes,
    repository_routes,
    rollout_routes,
    statistics_routes,
)
from unroll.service.api.stream import endpoint
from unroll.service.core import errors as core


def test_health(client: httpx.Client) -> None:
    for path, body in {
        "/livez": {"live": True},
        "/readyz": {"ready": True},
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
        "/v2/models/lstm/ready": {"name": "lstm", "ready": True},
        "/v2/models/gru/versions/1/ready": {"name": "gru", "ready": True},
    }.items():
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, body)


def test_a_server_that_is_not_ready_says_so_and_lives(serve: Serve) -> None:
    running = serve()
    running.server.ready = False
    with httpx.Client(base_url=running.url) as client:
        for path in ("/readyz", "/v2/health/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()) == (503, {"ready": False})
        for path in ("/livez", "/v2/health/live"):
            assert client.get(path).status_code == 200


def test_metrics_move(serve: Serve) -> None:
    running: Running = serve(session_capacity=2, spill_bytes=0)
    x = np.ones((3, 3), np.float32)
    with httpx.Client(base_url=running.url) as client:
        before = client.get("/metrics")
        assert before.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert all(value >= 0 for value in metrics(before.text).values())
        wire.infer(client, "hot", x, sequence_id=1, sequence_start=True)
        wire.infer(client, "hot", x, sequence_id=1, sequence_position=3)
        wire.infer(client, "hot", x, sequence_id=1, sequence_position=3)
        wire.infer(client, "hot", x * np.float32(3e38), sequence_id=1)
        wire.infer(client, "hot", x, sequence_id=1, sequence_start=True)
        for _ in range(2):
            client.post("/v1/models/hot/sessions").raise_for_status()
        client.post("/v1/models/hot/sequences", content=x.tobytes(), headers=raw_steps(x))
        client.post("/v1/models/hot/sessions/never/steps", content=x.tobytes(), headers=raw_steps(x))
        text = client.get("/metrics").text
    own = {"model": "hot", "version": "1"}
    for name, value in {
        "unroll_sessions": 2,
        "unroll_session_capacity": 2,
        "unroll_chunks_in_flight": 0,
        "unroll_steps_total": 12,
        "unroll_chunks_total": 4,
        "unroll_batches_total": 5,
        "unroll_replayed_total": 1,
        "unroll_refused_total": 0,
        "unroll_sessions_opened_total": 4,
        "unroll_sessions_restarted_total": 1,
        "unroll_batch_rows_count": 5,
        "unroll_batch_rows_sum": 5,
        "unroll_batch_seconds_count": 5,
    }.items():
        assert metric(text, name, **own) == value, name
    assert metric(text, "unroll_failed_total", code="non_finite_output", **own) == 1
    assert metric(text, "unroll_sessions_gone_total", code="session_evicted", **own) == 1
    for route, status, value in (("v2/infer", "200", 4), ("v2/infer", "422", 1), ("v1/steps", "404", 1)):
        assert metric(text, "unroll_requests_total", route=route, status=status) == value
    assert metric(text, "unroll_request_seconds_count", route="v1/sequences") == 1
    assert metric(text, "unroll_batch_seconds_sum", **own) > 0
    assert metric(text, "unroll_steps_total", model="lstm") == 0


# ── the OpenAPI document ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def document(client: httpx.Client) -> dict:
    return client.get("/openapi.json").json()


def operations(document: dict) -> Iterator[tuple[str, str, dict]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_docs_answer(client: httpx.Client) -> None:
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert "/openapi.json" in answer.text


def test_every_reference_leads_somewhere(document: dict) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        assert reference.startswith("#/")
        node = document
        for part in reference[2:].split("/"):
            node = node[part]


def test_every_schema_is_used(document: dict) -> None:
    used = {reference.rpartition("/")[2] for reference in references(document)}
    assert document["components"]["schemas"].keys() == used


def test_every_route_is_described(document: dict) -> None:
    names = set()
    for method, path, operation in operations(document):
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["responses"], where
        assert operation["tags"], where
        names.add(operation["operationId"])
        for status, response in operation["responses"].items():
            assert response["description"], (where, status)
        declared = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert declared == {part[1:-1] for part in path.split("/") if part.startswith("{")}, where
        if method in ("post", "put") and path != "/v1/tickets":
            content = operation["requestBody"]["content"]
            assert content, where
            if "application/json" in content:
                assert content["application/json"]["schema"], where
    assert len(names) == len(list(operations(document)))


def test_every_route_of_the_app_is_documented(server: Running, document: dict) -> None:
    documented = {(method.upper(), path) for method, path, _ in operations(document)}
    state = server.server
    routers = [
        native_routes.router(state),
        rollout_routes.router(state),
        statistics_routes.router(state),
        open_inference_routes.router(state, "0"),
        repository_routes.router(state),
        endpoint.router(state),
        health_routes.router(state),
        health_routes.metrics_router(state),
    ]
    routes = [r for router in routers for r in router.routes if getattr(r, "include_in_schema", False)]
    served = {(method, r.path_format) for r in routes for method in r.methods if method != "OPTIONS"}  # type: ignore[attr-defined]
    assert served == documented


def test_answers_of_the_transport_are_documented(document: dict) -> None:
    names = {
        found.name
        for method, path, _ in operations(document)
        if (found := inference_routes.find(method.upper(), path.split("/"))) is not None
    }
    assert names == {"v1/steps", "v1/sequences", "v1/sessions", "v2/infer"}


def test_v1_errors_are_problems(document: dict) -> None:
    for method, path, operation in operations(document):
        if path.startswith("/v1"):
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    schema = response["content"]["application/problem+json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Problem"}, (method, path, status)


def test_the_inference_routes_name_every_status_they_may_answer(document: dict) -> None:
    never = {core.Cancelled.status}
    sessions_only = {kind.status for kind in (core.SessionClosed, core.SessionExists)}
    raw_only = {core.UnsupportedMediaType.status}
    everything = {200, *(kind.status for kind in core.with_codes())} - never
    for path, expected in {
        "/v1/models/{model}/sessions/{session_id}/steps": everything,
        "/v1/models/{model}/sequences": everything - sessions_only,
        "/v2/models/{model}/infer": everything - raw_only,
        "/v2/models/{model}/versions/{version}/infer": everything - raw_only,
    }.items():
        assert {int(status) for status in document["paths"][path]["post"]["responses"]} == expected, path


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_pages_need_no_other_host(client: httpx.Client, page: str) -> None:
    answer = client.get(page)
    named = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", answer.text)
    assert len(named) >= 2
    for path in named:
        assert path.startswith("/"), path
        assert client.get(path).status_code == 200, path
    assert "://" not in answer.text
