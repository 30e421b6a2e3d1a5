"""JWTs of an identity provider: which ones are accepted, and how the provider's keys are kept up to date."""

import base64
import hmac
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from serving import Running
from waiting import PATIENCE, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from unroll.service.access import jwts
from unroll.service.access.jwt_config import JwtConfig
from unroll.service.access.jwt_verifier import KeySet
from unroll.service.access.keys import KeysRefused, new_key
from unroll.service.settings import Settings

ISSUER, AUDIENCE = "https://login.example/realm", "unroll"
RSA = rsa.generate_private_key(65537, 2048)
PUBLIC_PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
ELLIPTIC, NEXT, STRANGER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
EDWARDS = ed25519.Ed25519PrivateKey.generate()
DAY = 86_400


def public(key: Any, kid: str | None, **members: object) -> dict[str, Any]:
    """A key as an entry of a JWK set."""
    algorithm = {"R": RSAAlgorithm, "E": ECAlgorithm}.get(type(key).__name__[0], OKPAlgorithm)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = OKPAlgorithm
    entry = algorithm.to_jwk(key.public_key(), as_dict=True)
    return {**entry, **({} if kid is None else {"kid": kid}), **members}


KEYS = [public(RSA, "rsa"), public(ELLIPTIC, "ec"), public(EDWARDS, "ed")]


def claims(**changes: object) -> dict[str, Any]:
    """Return valid claims with changes; None removes a claim."""
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "edge", "tenant": "acme", "scope": "infer", "exp": now + DAY}
    return {name: value for name, value in (good | {"nbf": now - DAY} | changes).items() if value is not None}


def token(key: Any = ELLIPTIC, algorithm: str = "ES256", kid: str | None = "ec", **changes: Any) -> str:
    headers = changes.pop("headers", {}) | ({} if kid is None else {"kid": kid})
    return jwt.encode(claims(**changes), key, algorithm, headers=headers)


def by_hand(header: dict[str, Any], body: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """Encode a JWT that no library would make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, body)]
    signature = base64.urlsafe_b64encode(sign(b".".join(parts))).rstrip(b"=")
    return b".".join([*parts, signature]).decode()


class Provider:
    """A local identity provider: serves its JWK set and records the requests."""

    def __init__(self) -> None:
        self.content, self.status = json.dumps({"keys": KEYS}).encode(), 200
        self.asked: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked.append(self.path)
                provider.may_answer.wait(PATIENCE)
                self.send_response(provider.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(provider.content)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.stop()


class Guarded:
    """A server that accepts the provider's JWTs and one API key."""

    def __init__(self, repository: Path, folder: Path, keys: str) -> None:
        self.api_key, entry = new_key("edge", "acme", ["infer"])
        path = folder / "keys.toml"
        path.write_text(entry + "[tenants.small]\nsessions = 1\n")
        settings = {"repository": repository, "keys": path, "jwt_keys": keys}
        self.running = Running(Settings(**settings, jwt_issuer=ISSUER, jwt_audience=AUDIENCE))
        self.client = httpx.Client(base_url=self.running.url)

    def get(self, token: str) -> httpx.Response:
        return self.client.get("/v1/models", headers={"Authorization": f"Bearer {token}"})

    def stream(self, token: str) -> ClientConnection:
        url = self.running.url.replace("http", "ws") + "/v1/models/gru/stream"
        return connect(url, additional_headers={"Authorization": f"Bearer {token}"})

    def stop(self) -> None:
        self.client.close()
        self.running.stop()


@pytest.fixture(scope="module")
def guarded(repository: Path, provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(repository, tmp_path_factory.mktemp("guarded"), f"{provider.url}/jwks")
    until(lambda: guarded.get(token()).status_code == 200, "the set was read")
    yield guarded
    guarded.stop()


@pytest.mark.parametrize(
    "good",
    [
        token(),
        token(RSA, "RS256", "rsa"),
        token(EDWARDS, "EdDSA", "ed"),
        token(aud=["other", AUDIENCE]),
        token(scope=["openid", "infer"]),
        token(scope="openid infer profile"),
        token(nbf=None, sub=None),
        token(exp=int(time.time()) + DAY, iat=int(time.time())),
        token(headers={"typ": "at+jwt"}),
    ],
    ids=lambda good: str(claims() | jwt.decode(good, options={"verify_signature": False}))[:1],
)
def test_a_good_jwt_opens_the_server_as_a_key_does(guarded: Guarded, good: str) -> None:
    for headers in ({"Authorization": f"Bearer {good}"}, {"X-API-Key": good}, {"X-API-Key": guarded.api_key}):
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200


def attacks() -> dict[str, str]:
    now = int(time.time())
    elsewhere = {"jku": "http://127.0.0.1:1/jwks", "x5u": "http://127.0.0.1:1/", "jwk": public(STRANGER, "ec")}

    def hmac_with_public_key(signed: bytes) -> bytes:
        return hmac.digest(PUBLIC_PEM, signed, "sha256")

    return {
        "alg none": by_hand({"alg": "none", "kid": "ec"}, claims(), lambda _: b""),
        "alg None": by_hand({"alg": "None", "kid": "ec"}, claims(), lambda _: b""),
        "alg missing": by_hand({"kid": "ec"}, claims(), lambda _: b"x"),
        "hmac with the public key": by_hand({"alg": "HS256", "kid": "rsa"}, claims(), hmac_with_public_key),
        "another algorithm of the key": token(RSA, "PS256", "rsa"),
        "another key of the set": token(kid="rsa"),
        "kid unknown": token(kid="nobody"),
        "kid a path": token(kid="../../../../etc/passwd"),
        "kid a query": token(kid="' UNION SELECT 'key"),
        "kid a number": by_hand({"alg": "ES256", "kid": 1}, claims(), lambda _: b"x"),
        "kid a list": by_hand({"alg": "ES256", "kid": ["ec"]}, claims(), lambda _: b"x"),
        "kid missing": token(kid=None),
        "signed by a stranger": token(STRANGER),
        "a stranger's key inside": token(STRANGER, headers=elsewhere),
        "an unknown critical header": by_hand({"alg": "ES256", "kid": "ec", "crit": ["x"], "x": 1}, claims(), bytes),
        "expired": token(exp=now - 60),
        "valid later": token(nbf=now + 600),
        "issued later": token(iat=now + 600),
        "audience another": token(aud="other"),
        "audience none": token(aud=None),
        "audience a part": token(aud="unrol"),
        "issuer another": token(iss="https://login.example/realm/"),
        "issuer none": token(iss=None),
        "no end": token(exp=None),
        "end no number": by_hand({"alg": "ES256", "kid": "ec"}, claims(exp="soon"), bytes),
        "end never": token(exp=10**20),
        "end infinite": token(exp=float("inf")),
        "tenant none": token(tenant=None),
        "tenant a path": token(tenant="acme/../other"),
        "tenant marked": token(tenant="\x1dother"),
        "tenant a list": token(tenant=["acme"]),
        "scope none": token(scope=None),
        "scope a number": token(scope=1),
        "huge": token(padding="x" * 8192),
        "deep": by_hand({"alg": "ES256", "kid": "ec"}, {}, bytes).replace(
            "e30", base64.b64encode(b"[" * 6000).decode()
        ),
        "two dots": "..",
        "damaged": token()[:-8] + "AAAAAAAA",
        "of another's claims": ".".join(
            [token().split(".")[0], token(tenant="b").split(".")[1], token().split(".")[2]]
        ),
    }


@pytest.mark.parametrize(("name", "attack"), attacks().items(), ids=attacks())
def test_attacks(guarded: Guarded, provider: Provider, name: str, attack: str, capfd: pytest.CaptureFixture) -> None:
    before = len(provider.asked)
    answer = guarded.get(attack)
    assert answer.status_code in (401, 503), answer.text
    assert answer.json()["code"] == ("unauthenticated" if answer.status_code == 401 else "keys_unavailable")
    assert answer.status_code == 401 or name.startswith("kid")
    for part in (part for part in attack.split(".") if len(part) > 20):
        assert part not in answer.text + "".join(capfd.readouterr())
    assert set(provider.asked[before:]) <= {"/jwks"}


@pytest.mark.parametrize("claim", ["sub", "tenant"])
def test_a_claim_with_a_lone_surrogate_is_named(guarded: Guarded, claim: str) -> None:
    answer = guarded.get(token(**{claim: "\ud800"}))
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert f"its claim {claim!r}" in answer.json()["detail"]


def test_unknown_scopes_grant_nothing(guarded: Guarded) -> None:
    assert guarded.get(token(scope="openid profile")).json()["code"] == "forbidden"
    assert guarded.get(token(scope="metrics")).json()["code"] == "forbidden"
    answer = guarded.client.get("/metrics", headers={"Authorization": f"Bearer {token(scope='metrics')}"})
    assert answer.status_code == 200


def test_the_sessions_and_the_quota_are_of_the_tenant_in_the_jwt(guarded: Guarded) -> None:
    def opened(tenant: str, session_id: str) -> int:
        headers = {"Authorization": f"Bearer {token(tenant=tenant)}"}
        return guarded.client.post(
            "/v1/models/gru/sessions", json={"session_id": session_id}, headers=headers
        ).status_code

    assert [opened("small", "a"), opened("small", "b"), opened("large", "a"), opened("large", "b")] == [
        *(201, 429, 201, 201)
    ]
    mine = {"X-API-Key": guarded.api_key}
    assert guarded.client.get("/v1/models/gru/sessions/a", headers=mine).status_code == 404


def test_jwt_is_verified_only_once(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    decode = jwt.PyJWT.decode
    monkeypatch.setattr(jwt.PyJWT, "decode", lambda *args, **kwargs: verified.append(1) or decode(*args, **kwargs))
    own = token(sub="once")
    assert {guarded.get(own).status_code for _ in range(5)} == {200}
    assert len(verified) == 1


def test_stream_ends_with_its_own_jwt_only(guarded: Guarded) -> None:
    with guarded.stream(token()) as other, guarded.stream(guarded.api_key) as of_key:
        for life in (1, 4, 16, 64):  # a busy machine may need longer to connect
            try:
                stream = guarded.stream(token(exp=int(time.time()) - 30 + life))
                break
            except InvalidStatus:
                continue
        with stream, pytest.raises(ConnectionClosed) as closed:
            stream.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        for kept in (other, of_key):
            kept.send(json.dumps({"op": "open", "sessions": [{"handle": 1}]}))
            assert json.loads(kept.recv(PATIENCE))["sessions"][0]["position"] == 0


def test_a_ticket_of_a_jwt_lasts_no_longer_than_the_jwt(guarded: Guarded) -> None:
    def ticket(of: str) -> dict[str, Any]:
        return guarded.client.post("/v1/tickets", headers={"Authorization": f"Bearer {of}"}).json()

    assert ticket(token())["seconds"] == 30
    assert 0 < ticket(token(exp=int(time.time()) - 10))["seconds"] <= 20
    url = guarded.running.url.replace("http", "ws") + "/v1/models/gru/stream"
    protocols: list[Any] = ["unroll.v1", f"unroll.ticket.{ticket(token())['ticket']}"]
    with connect(url, subprotocols=protocols) as stream:
        assert stream.subprotocol == "unroll.v1"


def test_a_provider_changes_its_keys(
    guarded: Guarded, provider: Provider, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The first JWT with a new key triggers a request for the new set. An invalid set leaves the earlier one in use."""
    monkeypatch.setattr(jwts, "LEAST_SECONDS", 0.01)
    new, old = token(NEXT, kid="next"), token()
    with guarded.stream(old) as stream, guarded.stream(token(RSA, "RS256", "rsa")) as kept:
        refused = guarded.get(new)
        assert refused.json()["code"] == "keys_unavailable"
        assert refused.headers["retry-after"] == "1"
        for content, status in ((b"[", 200), (provider.content, 500), (provider.content, 302), (b"x" * 2**19, 200)):
            provider.content, provider.status, asked = content, status, len(provider.asked)
            guarded.get(new)
            until(lambda asked=asked: len(provider.asked) > asked, "the provider was asked")
            assert guarded.get(old).status_code == 200
        provider.content, provider.status = json.dumps({"keys": [KEYS[0], public(NEXT, "next")]}).encode(), 200
        until(lambda: guarded.get(new).status_code == 200, "the new key is known")
        assert guarded.get(old).status_code in (401, 503)
        with pytest.raises(ConnectionClosed):
            stream.recv(PATIENCE)
        kept.ping().wait(PATIENCE)
    assert "/elsewhere" not in provider.asked
    provider.content = json.dumps({"keys": KEYS}).encode()
    until(lambda: guarded.get(old).status_code == 200, "the old key is back")


def test_requests_for_unknown_keys_are_rate_limited(
    guarded: Guarded, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(provider.asked)
    monkeypatch.setattr(jwts, "LEAST_SECONDS", 0.0)
    assert guarded.get(token(kid="first")).json()["code"] == "keys_unavailable"
    until(lambda: len(provider.asked) > before, "the provider was asked")
    monkeypatch.setattr(jwts, "LEAST_SECONDS", float("inf"))
    until(lambda: guarded.get(token(kid="first")).status_code == 401, "the set was read")
    before = len(provider.asked)
    assert {guarded.get(token(kid=str(i))).status_code for i in range(20)} == {401}
    assert len(provider.asked) == before


def test_a_new_key_is_not_refused_while_the_set_is_read(
    guarded: Guarded, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwts, "LEAST_SECONDS", 0.0)
    provider.may_answer.clear()
    new, before = token(kid="new"), len(provider.asked)
    try:
        assert guarded.get(new).json()["code"] == "keys_unavailable"
        until(lambda: len(provider.asked) > before, "the provider was asked")
        monkeypatch.setattr(jwts, "LEAST_SECONDS", float("inf"))
        assert guarded.get(new).json()["code"] == "keys_unavailable"
    finally:
        provider.may_answer.set()
    until(lambda: guarded.get(new).status_code == 401, "the set was read, and has no such key")


def test_unreachable_provider_gives_keys_unavailable(repository: Path, tmp_path: Path) -> None:
    guarded = Guarded(repository, tmp_path, "http://127.0.0.1:1/jwks")
    try:
        assert guarded.get(guarded.api_key).status_code == 200
        answer = guarded.get(token())
        assert (answer.status_code, answer.json()["code"]) == (503, "keys_unavailable")
    finally:
        guarded.stop()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JWK set"),
        (b"[]", "not a JWK set"),
        (b'{"keys": [1]}', "not a JWK set"),
        (b"[" * 100_000, "not a JWK set"),
        ({"keys": []}, "1 to 100 keys"),
        ({"keys": [public(ELLIPTIC, "a", use="enc")]}, "1 to 100 keys"),
        ({"keys": [public(ELLIPTIC, "a"), public(NEXT, "a")]}, "same kid"),
        ({"keys": [public(ELLIPTIC, "a"), public(NEXT, None)]}, "has no kid"),
        ({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}, "is secret"),
        ({"keys": [RSAAlgorithm.to_jwk(RSA, as_dict=True) | {"kid": "a"}]}, "is secret"),
        ({"keys": [public(RSA, "a", alg="HS256")]}, "cannot be used"),
        ({"keys": [public(RSA, "a", alg="none")]}, "cannot be used"),
        ({"keys": [public(rsa.generate_private_key(65537, 1024), "a")]}, "1024 bits"),
        ({"keys": [public(ec.generate_private_key(ec.SECP256K1()), "a")]}, "is for ES256K"),
        ({"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "a"}]}, "cannot be used"),
    ],
)
def test_a_set_that_is_refused_says_why(content: bytes | dict, reason: str) -> None:
    with pytest.raises(KeysRefused, match=reason):
        KeySet.read(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_unknown_key_types_are_skipped() -> None:
    later = {"kty": "AKP", "alg": "ML-DSA-44", "kid": "later", "pub": "AAAA"}
    assert KeySet.read(json.dumps({"keys": [later, public(ELLIPTIC, "ec")]}).encode()).keys() == {"ec"}


def test_the_only_key_of_a_set_needs_no_kid(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public(ELLIPTIC, None)]}))
    found = jwts.Jwts(JwtConfig(str(path), ISSUER, AUDIENCE, "org", "scp"))
    key = found.find(token(kid=None, org="acme", scp=["metrics"], tenant="other").encode())
    assert (key.tenant, key.scopes, key.sha256) == ("acme", {"metrics"}, key.sha256)
    assert found.is_good(key)
    path.write_text("{")
    found.reload()
    assert found.is_good(key)
    path.write_text(json.dumps({"keys": [public(NEXT, None)]}))
    found.reload()
    assert not found.is_good(key), "another key under the same kid, or without one, did not sign it"


def test_server_without_pyjwt_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    for module in ("jwts", "jwt_verifier"):
        monkeypatch.delitem(sys.modules, f"unroll.service.access.{module}", raising=False)
    settings = Settings(repository=tmp_path, jwt_keys="x.json", jwt_issuer=ISSUER, jwt_audience=AUDIENCE)
    with pytest.raises(KeysRefused, match=r"unroll-serve\[jwt\]"):
        settings.gate()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"jwt_keys": "jwks.json"}, "--jwt-issuer and --jwt-audience"),
        ({"jwt_issuer": ISSUER}, "add --jwt-keys"),
        ({"jwt_keys": "http://login.example/jwks"}, "https://"),
        ({"jwt_keys": "https://user:password@login.example/jwks"}, "password"),
        ({"jwt_keys": "", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}, "empty"),
        ({"jwt_keys": "j", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "auth": "none"}, "contradict"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Settings.model_validate({"repository": "."} | settings)
