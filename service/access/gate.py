"""Decides from the headers whether to admit a request, before its body is decoded."""

import asyncio
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from unroll.service.access.jwt_config import JwtConfig
from unroll.service.access.keys import INFER, JwtKey, Key, KeyRing, KeysRefused, Quota, Scope
from unroll.service.access.tickets import Tickets
from unroll.service.core.errors import Forbidden, HostRefused, OriginRefused, Unauthenticated

if TYPE_CHECKING:
    from unroll.service.access.jwts import Jwts

_log = structlog.get_logger(__name__)

Headers = Mapping[bytes, bytes]

_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](:\d*)?")
_BEARER = b"bearer "
#: Maximum number of accepted Host headers and keys to remember; clients repeat theirs.
_MOST_REMEMBERED = 4096
#: Maximum interval between expiry checks, because the machine's clock may be changed.
_MOST_SECONDS = 3600.0


class Admission(NamedTuple):
    """An admitted request: its tenant, and the `Gate.edition` in which another with the same headers is admitted."""

    tenant: str
    edition: object


class Gate:
    """Authenticates and authorises requests. Without keys, every request to an allowed host is admitted.

    Args:
        keys: The keys file; None for a server without keys.
        hosts: Host names that clients may use for this server; None for any. This prevents DNS rebinding, in which an
            attacker's name resolves to this server, so that the attacker's pages have the same origin. Addresses are
            always allowed.
        origins: Origins of other hosts' pages that may use this server; `*` for all.
        ticket_secret: Signs tickets. Servers with the same secret accept each other's tickets; None for a random one.
        jwts: The provider whose JWTs are accepted in place of keys; None for none.

    Raises:
        KeysRefused: A file cannot be used, or JWTs cannot be verified here.

    Attributes:
        edition: Replaced when keys change.
    """

    def __init__(
        self,
        keys: Path | None = None,
        hosts: frozenset[str] | None = None,
        origins: Sequence[str] = (),
        ticket_secret: bytes | None = None,
        jwts: JwtConfig | None = None,
    ) -> None:
        self._path = keys
        self._jwts = None if jwts is None else _verifier(jwts)
        self._ring = self._read() if keys is not None else None if jwts is None else KeyRing({}, {})
        self._hosts = hosts
        self.origins = origins
        self._good_origins = {origin.encode() for origin in origins}
        self._good_hosts: set[bytes] = set()
        self._good_keys: dict[tuple[bytes, bytes], Key] = {}  # by header name and value
        self.edition = object()
        self._asked = asyncio.Event()
        self._tickets = Tickets(ticket_secret)
        self._watches: set[KeyWatch] = set()

    @property
    def has_keys(self) -> bool:
        return self._ring is not None

    def request_reload(self) -> None:
        """Schedule a reload of the keys file and the JWK set."""
        self._asked.set()

    async def run(self) -> None:
        """Reload on request, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._jwts is not None:
                tasks.create_task(self._jwts.run(self._look_again))
            while True:
                await self._asked.wait()
                self._asked.clear()
                await self.reload()

    async def reload(self) -> None:
        """Reload the files. A file that cannot be used changes nothing."""
        if self._path is not None:
            try:
                self._ring = await asyncio.to_thread(self._read)  # 10,000 keys take 0.2 s
            except KeysRefused as error:
                _log.error("keys not read, the previous ones stay", reason=str(error))
            else:
                _log.info("keys read", keys=len(self._ring.keys))
        if self._jwts is not None:
            self._jwts.reload()
        self._look_again()

    def _read(self) -> KeyRing:
        assert self._path is not None
        return KeyRing.read(self._path, only_keys=self._jwts is None)

    def _look_again(self) -> None:
        """Discard remembered keys, and recheck the watched ones, after a change."""
        self._good_keys.clear()
        self.edition = object()
        for watch in [*self._watches]:
            watch.check()

    @contextmanager
    def watching(self, key: Key | None, on_end: Callable[[], None]) -> Iterator[None]:
        """Inside the block, call `on_end` when the key becomes invalid or loses a permission."""
        if key is None:
            yield
            return
        watch = KeyWatch(key, self._current, on_end)
        self._watches.add(watch)
        try:
            yield
        finally:
            watch.stop()
            self._watches.discard(watch)

    def _current(self, key: Key) -> Key | None:
        if isinstance(key, JwtKey):
            return key if self._jwts is not None and self._jwts.is_good(key) and not key.is_over() else None
        found = None if self._ring is None else self._ring.keys.get(bytes.fromhex(key.sha256))
        if found is None or found.is_over() or found.tenant != key.tenant or not found.scopes >= key.scopes:
            return None
        return found

    def quota(self, tenant: str) -> Quota | None:
        return None if self._ring is None else self._ring.quotas.get(tenant)

    def admit(self, headers: Headers, scope: Scope, *, changes: bool) -> str:
        """Admit a request, and return its tenant; empty without keys.

        Args:
            headers: By lower-case name.
            changes: Whether the request may change anything.

        Raises:
            HostRefused: The Host header is not an allowed name.
            OriginRefused: A page of another origin tries to change something.
            Unauthenticated: The key is missing, unknown or expired.
            Forbidden: The key lacks the scope.
        """
        if self._hosts is not None:
            self.check_host(headers)
        if changes and b"origin" in headers and not self.accepts_page(headers, scope):
            origin = headers[b"origin"].decode("latin-1")
            raise OriginRefused(f"pages of {origin} may not use this server; see --allowed-origins")
        return "" if self._ring is None else self._permitted(self.key_of(headers), scope)

    def admit_head(self, headers: Headers, scope: Scope) -> Admission:
        """`admit` a request that may change something and whose connection may repeat its headers."""
        tenant = self.admit(headers, scope, changes=True)
        expires = self._ring is not None and self.key_of(headers).expires is not None
        return Admission(tenant, None if expires else self.edition)

    def admit_ticket(self, ticket: str, scope: Scope) -> Key | None:
        """The key of a ticket. Check the host first. Raises Unauthenticated, Forbidden."""
        if self._ring is None:
            return None
        key = self._key_of_ticket(self._ring, ticket)
        self._permitted(key, scope)
        return key

    def check_host(self, headers: Headers) -> None:
        """Raises HostRefused."""
        host = headers.get(b"host")
        if self._hosts is None or not host or host in self._good_hosts:
            return
        name = host_name(host.decode("latin-1"))
        if name not in self._hosts and not _is_address(name):
            raise HostRefused(f"this server is not known as {name!r}; if it should be, add it to --allowed-hosts")
        _remember(self._good_hosts, host)

    def accepts_page(self, headers: Headers, scope: Scope = INFER) -> bool:
        """Whether the page that sent the request may use this server; true if no page sent it.

        Browsers let any page send some requests and open WebSockets to any host, but name the page's origin. Without
        keys, pages of other origins may not operate the server.
        """
        origin = headers.get(b"origin")
        if origin is None or origin.partition(b"://")[1:] == (b"://", headers.get(b"host")):
            return True
        return (scope == INFER or self.has_keys) and bool(self._good_origins & {origin, b"*"})

    def key_of(self, headers: Headers) -> Key:
        """The key of the request. Raises Unauthenticated."""
        assert self._ring is not None
        name = b"x-api-key" if b"x-api-key" in headers else b"authorization"
        sent = name, headers.get(name, b"")
        key = self._good_keys.get(sent)
        if key is None or (key.expires is not None and key.is_over()):
            key = self._find(self._ring, _secret(*sent))
            if len(self._good_keys) >= _MOST_REMEMBERED:  # JWTs come and go
                del self._good_keys[next(iter(self._good_keys))]
            self._good_keys[sent] = key
        return key

    def _find(self, ring: KeyRing, secret: bytes) -> Key:
        key = ring.find(secret)
        if key is None and self._jwts is not None and secret.count(b".") == 2:
            return self._jwts.find(secret)
        if key is None:
            raise Unauthenticated("the API key is unknown, or has expired")
        return key

    def ticket(self, key: Key) -> tuple[str, float]:
        """Issue a ticket that opens streams with this key. Returns it and its lifetime in seconds."""
        return self._tickets.issue(key)

    def _key_of_ticket(self, ring: KeyRing, ticket: str) -> Key:
        digest, of_jwt = self._tickets.open(ticket)
        for key in ring.keys.values() if of_jwt is None else (of_jwt,):
            if bytes.fromhex(key.sha256).startswith(digest) and self._current(key) is not None:
                return key
        raise Unauthenticated("the ticket's API key is no longer known, or has expired")

    @staticmethod
    def _permitted(key: Key, scope: Scope) -> str:
        if scope not in key.scopes:
            raise Forbidden(f"the API key {key.name!r} lacks the required scope {scope!r}")
        return key.tenant


class KeyWatch:
    """Calls `on_end` when the key becomes invalid, until `stop`.

    Args:
        current: Returns the key in its current state; None if it is no longer valid.
    """

    def __init__(self, key: Key, current: Callable[[Key], Key | None], on_end: Callable[[], None]) -> None:
        self._key = key
        self._current = current
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self.check()

    def check(self) -> None:
        """Check now, and again when the key expires."""
        self.stop()
        key = self._current(self._key)
        if key is None:
            self._on_end()
        elif key.expires is not None:
            remaining = (key.expires - datetime.now(UTC)).total_seconds()
            self._timer = asyncio.get_running_loop().call_later(min(remaining, _MOST_SECONDS), self.check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _verifier(config: JwtConfig) -> "Jwts":
    """Raises KeysRefused."""
    try:
        from unroll.service.access.jwts import Jwts
    except ModuleNotFoundError as error:
        raise KeysRefused(f"--jwt-keys needs {error.name}: pip install 'unroll-serve[jwt]'") from None
    return Jwts(config)


def _secret(name: bytes, value: bytes) -> bytes:
    """The key in a header. Raises Unauthenticated."""
    if name == b"x-api-key":
        return value
    if value[: len(_BEARER)].lower() != _BEARER:
        raise Unauthenticated("this server requires an API key: send it as Authorization: Bearer, or as X-API-Key")
    return value[len(_BEARER) :].strip()


def host_name(host: str) -> str:
    if (address := _BRACKETED.fullmatch(host)) is not None:
        return address[1]
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _remember(good: set[bytes], value: bytes) -> None:
    if len(good) < _MOST_REMEMBERED:
        good.add(value)
