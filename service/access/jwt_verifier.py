"""Verifies JWTs of an identity provider, which are accepted in place of API keys (RFC 8725, RFC 9068).

    header   alg: the key's algorithm, which must be asymmetric;  kid: names the key in the provider's set
    claims   iss and aud as configured;  exp;  nbf and iat, if present;  the tenant;  the scopes

Only the set of `--jwt-keys` is trusted. Other sources of a key that a token names (jku, x5u, jwk) are ignored.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from unroll.service.access.jwt_config import JwtConfig
from unroll.service.access.keys import SCOPES, JwtKey, KeysRefused
from unroll.service.core.errors import Forbidden, KeysUnavailable, Unauthenticated

_ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"}
)
_KINDS = ("RSA", "EC", "OKP", "oct")
_LEAST_RSA_BITS = 2048
#: Maximum size of a token, below that of a header field.
_MOST_BYTES = 8192
#: Tolerated difference between the provider's clock and this machine's.
_LEEWAY = timedelta(seconds=30)
_MOST_KEYS = 100


class KeySet(dict[str, jwt.PyJWK]):
    """The provider's public keys by `kid`, which is optional in a set of one key.

    thumbprints: digests of the keys, because a `kid` may be reused for another key.
    """

    thumbprints: frozenset[str]

    @classmethod
    def read(cls, content: bytes) -> "KeySet":
        """Parse a JWK set (RFC 7517), skipping keys for other uses and of unknown kinds. Raises KeysRefused."""
        try:
            entries = json.loads(content)["keys"]
            found = [entry for entry in entries if entry.get("use", "sig") == "sig" and entry.get("kty") in _KINDS]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise KeysRefused('it is not a JWK set: {"keys": [...]}') from None
        if not 1 <= len(found) <= _MOST_KEYS:
            raise KeysRefused(f"a JWK set has 1 to {_MOST_KEYS} keys for signatures, this one has {len(found)}")
        if len(found) > 1 and not all(isinstance(entry.get("kid"), str) for entry in found):
            raise KeysRefused("it has several keys, and one of them has no kid")
        keys = cls({str(entry.get("kid", "")): _public_key(entry) for entry in found})
        if len(keys) < len(found):
            raise KeysRefused("two of its keys have the same kid")
        keys.thumbprints = frozenset(map(_thumbprint, keys.values()))
        return keys


def _public_key(entry: Mapping[str, Any]) -> jwt.PyJWK:
    """Raises KeysRefused."""
    name = f"its key {str(entry.get('kid', ''))[:80]!r}"
    if entry["kty"] == "oct" or "d" in entry:
        raise KeysRefused(f"{name} is secret: publish only the public key of an asymmetric pair")
    try:
        key = jwt.PyJWK.from_dict(dict(entry))
    except (jwt.PyJWTError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise KeysRefused(f"{name} cannot be used: {type(error).__name__}") from None
    if key.algorithm_name not in _ALGORITHMS:
        raise KeysRefused(f"{name} is for {key.algorithm_name}; allowed are {', '.join(sorted(_ALGORITHMS))}")
    if entry["kty"] == "RSA" and key.key.key_size < _LEAST_RSA_BITS:
        raise KeysRefused(f"{name} has {key.key.key_size} bits; an RSA key needs {_LEAST_RSA_BITS}")
    return key


def _thumbprint(key: jwt.PyJWK) -> str:
    return hashlib.sha256(key.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


class UnknownKid(Exception):
    """The set lacks the key that signed the token; a newer set may have it."""


class JwtVerifier:
    """Verifies tokens with the current key set. keys: None until a set has been read."""

    def __init__(self, config: JwtConfig) -> None:
        self._config = config
        self._jwt = jwt.PyJWT()
        self.keys: KeySet | None = None

    def verify(self, token: bytes) -> JwtKey:
        """Verify a token, and return its permissions.

        Raises:
            Unauthenticated: The token is invalid or expired, or lacks a claim. The message never quotes the token.
            UnknownKid: The current set lacks its key.
            Forbidden: The token has no scope of this server.
            KeysUnavailable: No set has been read yet.
        """
        if len(token) > _MOST_BYTES:
            raise Unauthenticated(f"the JWT has {len(token)} bytes; the limit is {_MOST_BYTES}")
        if self.keys is None:
            raise KeysUnavailable("the JWK set of --jwt-keys has not been read yet; the log says why")
        try:
            key = self._key(jwt.get_unverified_header(token).get("kid", ""), self.keys)
            claims = self._jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=_LEEWAY,
                options={"require": ["exp", "iss", "aud"], "verify_sub": False, "verify_jti": False},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Unauthenticated(f"the JWT is not accepted: {_reason(error)}") from None
        return self._permission(claims, token, _thumbprint(key))

    @staticmethod
    def _key(kid: str, keys: KeySet) -> jwt.PyJWK:
        if not kid and len(keys) == 1:
            return next(iter(keys.values()))
        if not kid:
            raise Unauthenticated("the JWT is not accepted: it has no kid to identify its key")
        if (key := keys.get(kid)) is None:
            raise UnknownKid(kid)
        return key

    def _permission(self, claims: Mapping[str, Any], token: bytes, signed_by: str) -> JwtKey:
        scopes = claims.get(self._config.scope)
        words = scopes.split() if isinstance(scopes, str) else scopes
        if not isinstance(words, list):
            raise Unauthenticated(
                f"the JWT is not accepted: its claim {self._config.scope!r} is neither words nor a list"
            )
        try:
            return JwtKey(
                name=str(claims.get("sub") or "JWT")[:64],
                tenant=claims.get(self._config.tenant),
                scopes=frozenset(SCOPES).intersection(word for word in words if isinstance(word, str)),
                sha256=hashlib.sha256(token).hexdigest(),
                expires=datetime.fromtimestamp(int(claims["exp"]), UTC) + _LEEWAY,
                signed_by=signed_by,
            )
        except ValidationError as error:
            field = error.errors()[0]["loc"][0]
            if field == "scopes":
                raise Forbidden(f"the JWT has none of the scopes {', '.join(SCOPES)}") from None
            if field == "name":
                raise Unauthenticated("the JWT is not accepted: its claim 'sub' has a lone surrogate") from None
            claim = self._config.tenant
            raise Unauthenticated(
                f"the JWT is not accepted: its claim {claim!r} is not a tenant: 1 to 32 letters, digits, . _ -"
            ) from None
        except (ValueError, OverflowError, OSError):
            raise Unauthenticated("the JWT is not accepted: its exp is not a time") from None


_REASONS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidIssuerError: "it is from another issuer",
    jwt.InvalidSignatureError: "its signature is wrong",
    jwt.InvalidAlgorithmError: "its algorithm does not match its key",
}


def _reason(error: Exception) -> str:
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it has no claim {error.claim!r}"
    return _REASONS.get(type(error), "it is damaged")
