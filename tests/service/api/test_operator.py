"""The operator port: routes that only it offers, and operations on a running server."""

import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from serving import Running, raw_steps
from tritonclient.utils import InferenceServerException
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from unroll.service.access.keys import new_key
from unroll.service.settings import Settings

X = np.ones((1, 3), np.float32)


@pytest.fixture
def operated(shelf: Path) -> Iterator[Running]:
    running = Running(Settings(repository=shelf, admin=True, admin_port=0))
    yield running
    running.stop()


def test_each_port_has_its_own_routes(operated: Running) -> None:
    for path in ("/livez", "/readyz", "/v2/health/ready"):
        assert httpx.get(operated.url + path).status_code == httpx.get(operated.operator_url + path).status_code == 200
    for path in ("/metrics", "/v1/admin/sessions"):
        assert httpx.get(operated.operator_url + path).status_code == 200
        assert httpx.get(operated.url + path).status_code == 404
    assert httpx.post(operated.url + "/v1/admin/drain").status_code == 404
    assert httpx.put(operated.url + "/v1/admin/log-level", json={"level": "debug"}).status_code == 404
    refused = httpx.post(operated.url + "/v2/repository/models/gru/unload")
    assert (refused.status_code, "--admin-port" in refused.json()["error"]) == (501, True)
    for path in ("/v1/models/gru/sequences", "/v2/models/gru/infer", "/v1/models/gru/sessions"):
        assert httpx.post(operated.operator_url + path, content=X.tobytes(), headers=raw_steps(X)).status_code == 404
    with pytest.raises(InvalidStatus):
        connect(operated.operator_url.replace("http", "ws") + "/v1/models/gru/stream")
    described = httpx.get(operated.operator_url + "/openapi.json").json()["paths"].keys()
    assert "/v1/admin/drain" in described
    assert described.isdisjoint({"/v1/models", "/v2/models/{model}/infer"})
    assert "/metrics" not in httpx.get(operated.url + "/openapi.json").json()["paths"]
    evil = httpx.post(operated.operator_url + "/v1/admin/drain", headers={"Origin": "https://evil.example"})
    assert evil.json()["code"] == "origin_refused"
    assert httpx.get(operated.operator_url + "/readyz", headers={"Host": "evil.example"}).status_code == 403


def test_operator_port_may_offer_only_metrics(shelf: Path) -> None:
    running = Running(Settings(repository=shelf, admin_port=0))
    assert httpx.get(running.operator_url + "/metrics").status_code == 200
    assert "/metrics" in httpx.get(running.operator_url + "/openapi.json").json()["paths"]
    assert httpx.get(running.operator_url + "/v1/admin/sessions").status_code == 404
    running.stop()


def test_pages_that_may_use_models_may_not_operate_a_server_without_keys(shelf: Path) -> None:
    running = Running(Settings(repository=shelf, admin=True, admin_port=0, allowed_origins=("*",)))
    page = {"Origin": "https://app.example"}
    assert httpx.post(f"{running.url}/v1/models/gru/sessions", headers=page).status_code == 201
    for path in ("/v1/admin/drain", "/v2/repository/models/gru/unload"):
        answer = httpx.post(running.operator_url + path, headers=page)
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused")
    assert httpx.get(f"{running.url}/readyz").status_code == 200
    running.stop()


def test_models_are_unloaded_and_loaded(operated: Running, shelf: Path, repository: Path) -> None:
    client = triton.InferenceServerClient(operated.operator_url.removeprefix("http://"))
    sessions = f"{operated.url}/v1/models/gru/sessions"
    assert httpx.post(sessions, json={"session_id": "open"}).status_code == 201
    for _ in range(2):  # another worker may already have done it
        client.unload_model("gru")
        assert httpx.post(sessions).json()["code"] == "model_unknown"
    step = httpx.post(f"{sessions}/open/steps", content=X.tobytes(), headers=raw_steps(X))
    assert step.status_code == 200, "a session goes on where it began"
    index = httpx.post(f"{operated.url}/v2/repository/index").json()
    assert {"name": "gru", "version": "", "state": "UNAVAILABLE", "reason": "unloaded by request"} in index
    operated.rescan_now()
    assert httpx.post(sessions).json()["code"] == "model_unknown", "it stays unloaded"
    client.load_model("gru")
    assert httpx.post(sessions).status_code == 201
    assert httpx.get(f"{sessions}/open").json()["position"] == 1
    shutil.copytree(repository / "lstm" / "1", shelf / "lstm" / "1")
    client.load_model("lstm")
    assert httpx.post(f"{operated.url}/v1/models/lstm/sessions").status_code == 201
    with pytest.raises(InferenceServerException, match="no model 'none'"):
        client.load_model("none")
    (shelf / "broken" / "1").mkdir(parents=True)
    (shelf / "broken" / "1" / "manifest.json").write_text("{")
    with pytest.raises(InferenceServerException, match="is not served"):
        client.load_model("broken")
    client.close()


#: Request bodies that would upload a model.
BRINGING = (
    {"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}},
    {"parameters": {"config": '{"backend": "python"}'}},
    {"parameters": {"path": "/etc"}},
    {"url": "https://evil.example/model.onnx"},
    {"parameters": ["x"]},
    [],
)


def test_request_cannot_upload_a_model(operated: Running) -> None:
    with httpx.Client(base_url=f"{operated.operator_url}/v2/repository/models") as client:
        for name, verb, body in itertools.product(("gru", "..%2Fgru", "%2Fetc"), ("load", "unload"), BRINGING):
            assert client.post(f"/{name}/{verb}", json=body).status_code == 400, (name, verb, body)
        for name in ("..%2Fgru", "%2Fetc", "https:%2F%2Fevil.example%2Fgru", "..", "gru%2F1"):
            assert client.post(f"/{name}/load").status_code == 404, name
    assert httpx.get(f"{operated.url}/v1/models/gru").status_code == 200


def test_a_drain_and_the_log_level(operated: Running) -> None:
    admin = f"{operated.operator_url}/v1/admin"
    assert httpx.put(f"{admin}/log-level", json={"level": "debug"}).json() == {"level": "debug"}
    assert logging.getLogger().level == logging.DEBUG
    for wrong in ({"level": "loud"}, {}, {"level": "info", "logger": "x"}):
        assert httpx.put(f"{admin}/log-level", json=wrong).json()["code"] == "malformed_request"
    sessions = f"{operated.url}/v1/models/gru/sessions"
    assert httpx.post(sessions, json={"session_id": "open"}).status_code == 201
    assert httpx.post(f"{admin}/drain", json={"until": "later"}).status_code == 400
    assert httpx.get(f"{operated.url}/readyz").status_code == 200
    assert httpx.post(f"{admin}/drain").json() == {"ready": False}
    for url in (operated.url, operated.operator_url):
        assert httpx.get(f"{url}/readyz").status_code == 503
    assert httpx.post(sessions).json()["code"] == "draining"
    step = httpx.post(f"{sessions}/open/steps", content=X.tobytes(), headers=raw_steps(X))
    assert step.status_code == 200


def test_without_keys_the_main_port_offers_no_operations(shelf: Path) -> None:
    running = Running(Settings(repository=shelf, admin=True))
    assert httpx.get(f"{running.url}/v1/admin/sessions").status_code == 200
    assert httpx.post(f"{running.url}/v1/admin/drain").status_code == 404
    assert httpx.post(f"{running.url}/v2/repository/models/gru/unload").status_code == 501
    running.stop()


def test_the_operators_port_takes_the_keys_too(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    made = {scope: new_key(scope, "acme", [scope]) for scope in ("infer", "metrics", "models:admin", "server:admin")}
    path.write_text("\n".join(entry for _, entry in made.values()))
    running = Running(Settings(repository=shelf, keys=path, admin=True, admin_port=0))
    for scope, method, route in (
        ("metrics", "GET", "/metrics"),
        ("models:admin", "POST", "/v2/repository/models/gru/load"),
        ("server:admin", "PUT", "/v1/admin/log-level"),
        ("server:admin", "POST", "/v1/admin/drain"),
    ):
        content = json.dumps({"level": "info"}).encode() if method == "PUT" else b""
        assert httpx.request(method, running.operator_url + route, content=content).status_code == 401
        for name, (secret, _) in made.items():
            answer = httpx.request(method, running.operator_url + route, content=content, headers={"X-API-Key": secret})
            assert answer.status_code == (200 if name == scope else 403), (name, route)
    running.stop()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"admin_port": 0, "admin_host": "0.0.0.0"}, "everyone who can reach 0.0.0.0"),
        ({"admin_host": "127.0.0.2"}, "add --admin-port"),
    ],
)
def test_settings_that_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Settings.model_validate({"repository": "."} | settings)
