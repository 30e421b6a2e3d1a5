"""Secrets planted in a run appear neither in its output, nor in its answers, nor in its process information."""

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import quote

import httpx
import jwt
import numpy as np
import pytest
import wire
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from processes import Process, StartProcess
from redis_server import RedisServer
from serving import raw_steps
from waiting import PATIENCE
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from unroll.cli import main
from unroll.service.access.keys import SCOPES, new_key
from unroll.service.doctor import ask

X = np.ones((1, 3), np.float32)
PASSWORD, SNAPSHOT_KEY = "canary-redis-/+password", "canary-snapshot-key-of-old"
#: A server that raises an unexpected error on one session's lookup and logs a traceback.
SCRIPT = """
import sys
from unroll import cli
from unroll.service.store.redis_store import RedisStore
load = RedisStore.load_all
async def broken(self, keys):
    if any("broken" in session_id for _, session_id in keys):
        raise RuntimeError("unexpected")
    return await load(self, keys)
RedisStore.load_all = broken
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""
PROVIDER = ec.generate_private_key(ec.SECP256R1())


class Planted:
    """A server of two workers with every kind of secret, and all of its output.

    Attributes:
        secrets: The planted secrets by kind.
        heard: All output and answers of the run, by source.
    """

    def __init__(self, start: StartProcess, redis_server: RedisServer, folder: Path) -> None:
        redis_server.client.acl_setuser(
            "canary", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", commands=["+@all"]
        )
        address = redis_server.url.partition("://")[2]
        api_key, entry = new_key("edge", "acme", SCOPES)
        claims = {"iss": "i", "aud": "a", "tenant": "acme", "scope": " ".join(SCOPES), "exp": int(time.time()) + 86_400}
        self.jwt = jwt.encode(claims, PROVIDER, "ES256")
        self.secrets = {"API key": api_key, "snapshot key": SNAPSHOT_KEY, "password": PASSWORD[:-1], "JWT": self.jwt}
        self.heard: dict[str, str] = {}
        jwks = {"keys": [ECAlgorithm.to_jwk(PROVIDER.public_key(), as_dict=True)]}
        for name, text in {
            "keys.toml": entry,
            "jwks.json": json.dumps(jwks),
            "store": f"redis://canary:{quote(PASSWORD, safe='')}@{address}",
            "snapshot-keys": f"canary-snapshot-key-of-new\n{SNAPSHOT_KEY}\n",
        }.items():
            (folder / name).write_text(text)
        self.wrong_store = folder / "wrong"
        self.wrong_store.write_text(f"redis://canary:{PASSWORD[:-1].replace('/', '%2F')}@{address}")
        self.flags = [
            *("--store", f"@{folder / 'store'}", "--snapshot-keys", f"@{folder / 'snapshot-keys'}"),
            *("--keys", str(folder / "keys.toml"), "--jwt-keys", str(folder / "jwks.json")),
            *("--jwt-issuer", "i", "--jwt-audience", "a", "--log-level", "debug", "--log-requests", "all"),
            *("--admin", "--page", "--store-timeout", "5"),
        ]
        self.redis = redis_server
        self.process: Process = start(*self.flags, "--workers", "2", script=SCRIPT)
        started = [line["event"] for line in self.process.log if "Started server process" in line["event"]]
        self.children = [int(event.partition("[")[2].rstrip("]")) for event in started]
        self.client = httpx.Client(base_url=self.process.url, headers={"Authorization": f"Bearer {api_key}"})
        self.secrets["ticket"] = self.client.post("/v1/tickets").json()["ticket"]
        self.secrets["ticket of the JWT"] = self.send("POST", "/v1/tickets", key=self.jwt).json()["ticket"]

    def send(self, method: str, path: str, *, key: str | None = None, **request: object) -> httpx.Response:
        headers = {**request.pop("headers", {}), **({} if key is None else {"Authorization": f"Bearer {key}"})}
        answer = self.client.request(method, path, headers=headers, **request)  # type: ignore[arg-type]
        if path != "/v1/tickets" or answer.is_error:
            self.heard[f"{method} {path} {len(self.heard)}"] = f"{answer.headers} {answer.text}"
        return answer

    def found(self) -> list[tuple[str, str]]:
        """Return the secrets found, with their source."""
        forms = {}
        for name, secret in self.secrets.items():
            encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
            forms[name] = {secret, quote(secret, safe=""), encoded, secret.encode().hex(), secret.split(".")[-1]}
        heard = self.heard.items()
        return [(where, name) for where, text in heard for name in forms if any(form in text for form in forms[name])]


@pytest.fixture
def planted(start_process: StartProcess, redis_server: RedisServer, tmp_path: Path) -> Iterator[Planted]:
    folder = tmp_path / "secrets"
    folder.mkdir()
    planted = Planted(start_process, redis_server, folder)
    yield planted
    planted.client.close()
    redis_server.client.acl_deluser("canary")


def test_secrets_appear_nowhere(
    planted: Planted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in planted.children:
        planted.heard[f"process {pid}"] = Path(f"/proc/{pid}/cmdline").read_text()
    assert main(["config", "show", "--repository", "x", *planted.flags]) == 0
    planted.heard["settings"] = capsys.readouterr().out
    ask_everything(planted)
    break_things(planted)
    monkeypatch.setattr(
        ask, "_run", Mock(side_effect=ask.TrialFailed("not tried"))
    )  # takes seconds and holds no secrets
    main(["doctor", "--store", f"@{planted.wrong_store}", "--device", "cpu"])
    planted.heard["doctor"] = capsys.readouterr().out
    assert "invalid username-password" in planted.heard["doctor"]
    planted.process.popen.send_signal(signal.SIGTERM)
    assert planted.process.end() == 0
    planted.heard["log"] = "\n".join(map(json.dumps, planted.process.log))
    assert "session not loaded from the store" in planted.heard["log"], "a traceback was logged"
    assert len(planted.heard) > 40
    assert planted.found() == []
    assert not [where for where, text in planted.heard.items() if "\x1d" in text or r"\u001d" in text]


def ask_everything(planted: Planted) -> None:
    """Send every kind of request, valid and invalid, some with a secret in the wrong place."""
    api_key, session = planted.secrets["API key"], "/v1/models/gru/sessions"
    raw = {"content": X.tobytes(), "headers": raw_steps(X)}
    for key in (None, planted.jwt):
        planted.send("POST", session, key=key, json={"session_id": "s"})
        planted.send("POST", f"{session}/s/steps", key=key, **raw)
        planted.send("GET", f"{session}/s/state", key=key)
    held = planted.send("POST", session, json={"session_id": "h", "durability": "client"}).json()["snapshot"]
    planted.send("POST", f"{session}/h/steps", json={"inputs": {"x": X.tolist()}, "snapshot": held[:-8] + "AAAAAAAA"})
    for method, path in (
        *(("GET", path) for path in ("/", "/metrics", "/openapi.json", "/docs", "/v1/models", "/v1/admin/sessions")),
        *(("GET", path) for path in ("/v2", "/v2/models/gru", "/readyz", "/none", f"/v1/models?key={api_key}")),
        *(("POST", path) for path in ("/v1/admin/log-level", "/v2/repository/models/gru/load", "/v2/repository/index")),
        *(("POST", path) for path in ("/v1/models/gru/sequences", "/v2/models/gru/infer", f"{session}/none/fork")),
        ("PUT", f"{session}/s/state"),
        ("DELETE", f"{session}/none"),
    ):
        planted.send(method, path)
    made = wire.body({"x": X[np.newaxis]}, sequence_id=7, sequence_start=True)
    planted.send("POST", "/v2/models/gru/infer", content=made.content, headers=made.headers)
    for wrong in (api_key + "x", planted.jwt + "x", planted.jwt[:-20], f"x{planted.secrets['password']}"):
        assert planted.send("GET", "/v1/models", key=wrong).status_code == 401
        assert planted.send("POST", f"{session}/s/steps", key=wrong, **raw).status_code == 401
    assert planted.send("GET", "/v1/models", headers={"X-API-Key": f"Bearer {api_key}"}).status_code == 401
    assert planted.send("GET", "/v1/models", headers={"Authorization": f"Basic {api_key}"}).status_code == 401
    url = planted.process.url.replace("http", "ws") + "/v1/models/gru/stream"
    for name in ("ticket", "ticket of the JWT"):
        offered = Subprotocol(f"unroll.ticket.{planted.secrets[name]}")
        with connect(url, subprotocols=[Subprotocol("unroll.v1"), offered]) as stream:
            stream.send(json.dumps({"op": "open", "sessions": [{"handle": 1, "session_id": "s", "mode": "resume"}]}))
            planted.heard[f"stream by {name}"] = str(stream.recv(PATIENCE))
            stream.send(b"no frame")
            planted.heard[f"stream by {name}, refused"] = str(stream.recv(PATIENCE))
        with pytest.raises(InvalidStatus) as refused:
            connect(url, subprotocols=[Subprotocol(f"{offered}x")])
        planted.heard[f"damaged {name}"] = f"{refused.value.response.headers} {refused.value.response.body!r}"


def break_things(planted: Planted) -> None:
    """Cause an unreadable record and the death of a worker."""
    assert planted.send("GET", "/v1/models/gru/sessions/broken").status_code == 422
    for path in ("/v2/repository/models/gru/unload", "/v1/admin/drain"):
        planted.send("POST", path)
    os.kill(planted.children[0], signal.SIGKILL)
    log = planted.process.log
    while "worker exited" not in log[-1]["event"]:
        log.append(json.loads(planted.process.popen.stderr.readline()))
