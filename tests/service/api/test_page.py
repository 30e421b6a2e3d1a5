"""The page at `/` over HTTP, and access by pages of other origins."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import RAW, Running
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from unroll.service.settings import Settings

BROWSER = "Mozilla/5.0 (X11; Linux x86_64)"
FRIEND, STRANGER = "https://app.example", "https://evil.example"


@pytest.fixture(scope="module")
def friendly(few: Path) -> Iterator[Running]:
    """A server that allows one other origin and serves no page."""
    running = Running(Settings(repository=few, page=False, allowed_origins=(FRIEND,)))
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("host", "given", "shown"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("localhost", {}, True),
        ("0.0.0.0", {}, False),
        ("serving.example", {}, False),
        ("0.0.0.0", {"page": True}, True),
        ("127.0.0.1", {"page": False}, False),
    ],
)
def test_only_a_loopback_address_shows_the_page_unasked(host: str, given: dict, shown: bool) -> None:
    assert Settings(repository=Path("bundles"), auth="none", host=host, **given).shows_page is shown


def test_the_page_and_its_files_come_with_headers_that_keep_it_to_this_server(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in ("app.mjs", "style.css", "unroll.mjs", "co2.csv", "icon.svg"):
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == page.headers["content-security-policy"]
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert (page.headers["x-content-type-options"], page.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert client.get("/page/app.mjs").headers["content-type"].startswith("text/javascript")
    again = client.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/page/nothing.mjs", "/page/..%2Fsettings.py", "/page/%2e%2e%2fapp.py", "/page/"])
def test_no_other_file_is_served(client: httpx.Client, path: str) -> None:
    assert client.get(path).json()["code"] == "not_found"


def test_without_the_page_its_paths_are_unknown(friendly: Running) -> None:
    for path in ("/", "/page/app.mjs"):
        assert httpx.get(friendly.url + path).json()["code"] == "not_found"


def test_a_model_describes_its_state_row_and_its_bundle(client: httpx.Client, repository: Path) -> None:
    model = client.get("/v1/models/lstm").json()
    assert [slot["kind"] for slot in model["state"]] == ["h", "c"] * (len(model["state"]) // 2)
    assert sum(slot["size"] for slot in model["state"]) == model["state_size"]
    assert model["bundle_bytes"] == sum(file.stat().st_size for file in (repository / "lstm" / "1").iterdir())
    assert all(model["parity"][output] <= allowed for output, allowed in model["tolerance"].items())
    both = client.get("/v1/models/gru:1").json()
    assert (both["versions"], both["current_version"]) == (["1", "2"], "2")
    assert client.get("/v1/models/tokens").json()["inputs"][0]["limit"] > 1


def test_allowed_origins_may_read_answers_and_others_may_not(friendly: Running) -> None:
    steps = "/v1/models/lstm/sessions/s/steps"
    with httpx.Client(base_url=friendly.url) as http:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "unroll-position"}
        preflight = http.options(steps, headers={"origin": FRIEND, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == FRIEND
        assert "unroll-position" in preflight.headers["access-control-allow-headers"].lower()
        refused = http.options(steps, headers={"origin": STRANGER, **asked})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
        http.post("/v1/models/lstm/sessions", json={"session_id": "s"})
        for origin, position in ((FRIEND, "1"), (STRANGER, None), (None, "2")):
            headers = {**RAW, **({} if origin is None else {"origin": origin})}
            answer = http.post(steps, content=bytes(12), headers=headers)
            assert answer.headers.get("unroll-position") == position
            assert position is not None or answer.json()["code"] == "origin_refused"
            assert answer.headers.get("access-control-allow-origin") == (FRIEND if origin == FRIEND else None)
            unknown = http.post("/v2/models/nobody/infer", json={}, headers=headers)
            assert unknown.headers.get("access-control-allow-origin") == (FRIEND if origin == FRIEND else None)
        exposed = http.get("/v1/models", headers={"origin": FRIEND}).headers["access-control-expose-headers"]
        assert "Unroll-Position" in exposed
    for origin in ({}, {"origin": FRIEND}, {"origin": STRANGER}):
        answer = httpx.get(f"{friendly.url}/v1/models", headers=origin)
        assert ("access-control-allow-origin" in answer.headers) == (origin == {"origin": FRIEND})
        assert answer.headers["vary"] == "Origin", "a cache may answer another origin with it"


def test_a_page_that_may_not_open_a_stream_learns_why(friendly: Running, server: Running) -> None:
    def stream(running: Running, origin: str, agent: str | None = None) -> ClientConnection:
        address = f"ws://{running.address}/v1/models/lstm/stream"
        return connect(address, additional_headers={"Origin": origin}, user_agent_header=agent)

    for origin in (FRIEND, f"http://{friendly.address}"):
        with stream(friendly, origin, BROWSER) as opened:
            opened.send("{}")
            assert json.loads(opened.recv())["code"] == "malformed_request"
    for running, origin in ((friendly, STRANGER), (server, FRIEND)):
        with stream(running, origin, BROWSER) as closed, pytest.raises(ConnectionClosed) as ended:
            closed.recv()
        assert ended.value.rcvd is not None
        assert ended.value.rcvd.code == 4403
        assert "--allowed-origins" in ended.value.rcvd.reason
        with pytest.raises(InvalidStatus) as refusal:
            stream(running, origin)
        assert json.loads(refusal.value.response.body)["code"] == "forbidden"


@pytest.mark.parametrize("origin", ["https://app.example/", "app.example", "https://App.example", "", "https://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origins"):
        Settings(repository=Path("bundles"), allowed_origins=(origin,))
