"""JWTs, verified with the provider's JWK set from a file or from a URL that is fetched periodically."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from unroll.service.access.jwt_config import JwtConfig
from unroll.service.access.jwt_verifier import JwtVerifier, KeySet, UnknownKid
from unroll.service.access.keys import JwtKey, KeysRefused
from unroll.service.core.errors import KeysUnavailable, Unauthenticated

_log = structlog.get_logger(__name__)

#: Interval between fetches, and the minimum interval after an unknown key or a failure.
REFRESH_SECONDS = 300.0
LEAST_SECONDS = 10.0
_TIMEOUT_SECONDS = 5.0
_MOST_BYTES = 2**18


class Jwts:
    """Keeps the JWK set current. If a new set cannot be read, the previous one stays, and the log says why.

    Raises:
        KeysRefused: The file cannot be used. A URL may be unreachable at first.
    """

    def __init__(self, config: JwtConfig) -> None:
        self._config = config
        self._verifier = JwtVerifier(config)
        self._asked_at = float("-inf")
        self._asking = False
        self._unknown = asyncio.Event()
        if not config.is_url:
            self._verifier.keys = self._read_file()

    def find(self, token: bytes) -> JwtKey:
        """Verify a token. Raises Unauthenticated, Forbidden, KeysUnavailable: see `JwtVerifier.verify`."""
        try:
            return self._verifier.verify(token)
        except UnknownKid:
            if not self._asking:
                if not self._config.is_url or time.monotonic() - self._asked_at < LEAST_SECONDS:
                    raise Unauthenticated("the JWT is signed by an unknown key") from None
                self._unknown.set()
            raise KeysUnavailable("the JWT is signed by a new key: the JWK set is being read again") from None

    def is_good(self, key: JwtKey) -> bool:
        """Whether the set still has the key that signed it."""
        return self._verifier.keys is not None and key.signed_by in self._verifier.keys.thumbprints

    def reload(self) -> None:
        """Reload a file now; schedule a fetch of a URL."""
        if self._config.is_url:
            self._unknown.set()
            return
        try:
            self._verifier.keys = self._read_file()
        except KeysRefused as error:
            _log.error("JWK set not read, the previous one stays", reason=str(error))

    async def run(self, on_change: Callable[[], None]) -> None:
        """Fetch the URL periodically, until cancelled. on_change: called after each new set."""
        while self._config.is_url:
            self._unknown.clear()
            self._asked_at, self._asking = time.monotonic(), True
            keys = await self._fetch()
            self._asking = False
            if keys is not None:
                self._verifier.keys = keys
                on_change()
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAST_SECONDS if keys is None else REFRESH_SECONDS):
                    await self._unknown.wait()

    def _read_file(self) -> KeySet:
        try:
            return KeySet.read(Path(self._config.keys).read_bytes())
        except (OSError, KeysRefused) as error:
            raise KeysRefused(f"{self._config.keys}: {error}") from None

    async def _fetch(self) -> KeySet | None:
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(_TIMEOUT_SECONDS)
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(self._config.keys, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise KeysRefused(f"it answers {answer.status}")
                content = bytearray()
                async for part in answer.content.iter_any():
                    content += part
                    if len(content) > _MOST_BYTES:
                        raise KeysRefused(f"it has more than {_MOST_BYTES} bytes")
            return KeySet.read(bytes(content))
        except (aiohttp.ClientError, TimeoutError, OSError, KeysRefused) as error:
            reason = str(error) or type(error).__name__
            _log.error("JWK set not read, the previous one stays", url=self._config.keys, reason=reason)
            return None
