"""Decides whether a request may come in, from its headers, before anything of it is decoded."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import secrets
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import structlog

from unroll.service.access.keys import Key, KeyRing, KeysRefused, Quota, Scope
from unroll.service.core.errors import Forbidden, HostRefused, OriginRefused, Unauthenticated

_log = structlog.get_logger(__name__)

Headers = Mapping[bytes, bytes]

#: A browser cannot send a header with a WebSocket: it offers this protocol, followed by a ticket.
TICKET_PROTOCOL = "unroll.ticket."
TICKET_SECONDS = 30.0
#: Digest of the key (its first bytes), nonce, expiry in Unix time; then the signature.
_TICKET = struct.Struct("<16s8sd")
_SIGNATURE = 16
_DIGEST = 16

_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](:\d*)?")
_BEARER = b"bearer "
#: Host headers and keys that were good; a client repeats its own.
_MOST_REMEMBERED = 4096


class Gate:
    """Without keys every request may come in, if its host is allowed, and there are no tenants.

    Args:
        keys: The file of keys; None for a server without keys.
        hosts: The names that clients may use for this server; None for any. Addresses are always allowed: a name can
            be made to point here by whoever owns it, and the pages of that name would then be of the same origin.
        origins: Of the pages on other hosts that may use this server; `*`: of all.
        ticket_secret: Signs tickets. Servers that take each other's tickets have the same; None for a random one.

    Raises:
        KeysRefused: The file cannot be used.
    """

    def __init__(
        self,
        keys: Path | None = None,
        hosts: frozenset[str] | None = None,
        origins: Sequence[str] = (),
        ticket_secret: bytes | None = None,
    ) -> None:
        self._path = keys
        self._looked = datetime.now(UTC)  # when it was last seen whether keys expire
        self._ring = None if keys is None else KeyRing.read(keys)
        self._hosts = hosts
        self.origins = origins
        self._good_origins = {origin.encode() for origin in origins}
        self._good_hosts: set[bytes] = set()
        self._good_keys: dict[tuple[bytes, bytes], Key] = {}  # by the header that they came in
        self._asked = asyncio.Event()
        self._ticket_secret = hmac.digest(ticket_secret or secrets.token_bytes(32), b"tickets", "sha256")

    @property
    def has_keys(self) -> bool:
        return self._ring is not None

    def request_reload(self) -> None:
        """Read the file of keys again soon."""
        self._asked.set()

    async def run(self, on_removed: Callable[[], None]) -> None:
        """Read the file whenever that is asked for, until cancelled.

        Args:
            on_removed: Called if a key permits less than before, or nothing; also when one expires.
        """
        while True:
            try:
                async with asyncio.timeout(self._next_expiry()):
                    await self._asked.wait()
            except TimeoutError:
                self._looked = datetime.now(UTC)
                on_removed()
                continue
            self._asked.clear()
            if self.reload():
                on_removed()

    def _next_expiry(self) -> float | None:
        """Seconds until a key expires; None: none will."""
        keys = () if self._ring is None else self._ring.keys.values()
        ends = [key.expires for key in keys if key.expires is not None and key.expires > self._looked]
        return (min(ends) - datetime.now(UTC)).total_seconds() if ends else None

    def reload(self) -> bool:
        """Read the file of keys again. One that cannot be used changes nothing. True if a key permits less now."""
        if self._path is None or self._ring is None:
            return False
        before = self._ring.keys
        try:
            self._ring = KeyRing.read(self._path)
        except KeysRefused as error:
            _log.error("keys not read, the earlier ones stay", reason=str(error))
            return False
        self._good_keys.clear()
        _log.info("keys read", keys=len(self._ring.keys))
        return any(self._ring.keys.get(digest) != key for digest, key in before.items())

    def quota(self, tenant: str) -> Quota | None:
        return None if self._ring is None else self._ring.quotas.get(tenant)

    def admit(self, headers: Headers, scope: Scope, *, changes: bool) -> str:
        """The tenant of a request that may come in; empty without keys.

        Args:
            headers: Of the request.
            scope: That its key needs.
            changes: Whether it may change anything, or only asks.

        Raises:
            HostRefused: It is for a host that this server is not known by.
            OriginRefused: A page of another origin wants to change something.
            Unauthenticated: It has no key, or one that is unknown or has expired.
            Forbidden: Its key has another scope.
        """
        if self._hosts is not None:
            self.check_host(headers)
        if changes and b"origin" in headers and not self.accepts_page(headers):
            origin = headers[b"origin"].decode("latin-1")
            raise OriginRefused(f"pages of {origin} may not use this server; see --allowed-origins")
        return "" if self._ring is None else self._permitted(self.key_of(headers), scope)

    def admit_ticket(self, ticket: str, scope: Scope) -> str:
        """`admit` for a ticket, of a request whose host was checked. Raises Unauthenticated, Forbidden."""
        return "" if self._ring is None else self._permitted(self._key_of_ticket(self._ring, ticket), scope)

    def check_host(self, headers: Headers) -> None:
        """Raises HostRefused."""
        host = headers.get(b"host")
        if self._hosts is None or not host or host in self._good_hosts:
            return
        name = host_name(host.decode("latin-1"))
        if name not in self._hosts and not _is_address(name):
            raise HostRefused(f"this server is not known as {name!r}; if it should be, add it to --allowed-hosts")
        _remember(self._good_hosts, host)

    def accepts_page(self, headers: Headers) -> bool:
        """Whether the page that sent a request, if one did, may use this server.

        A browser lets any page send some requests, and open WebSockets, to any host, and says which page it was. Other
        clients say nothing.
        """
        origin = headers.get(b"origin")
        if origin is None or origin.partition(b"://")[2] == headers.get(b"host"):
            return True
        return origin in self._good_origins or b"*" in self._good_origins

    def key_of(self, headers: Headers) -> Key:
        """The key of a request. Raises Unauthenticated."""
        assert self._ring is not None
        name = b"x-api-key" if b"x-api-key" in headers else b"authorization"
        sent = name, headers.get(name, b"")
        key = self._good_keys.get(sent)
        if key is None or key.expires is not None:
            key = self._ring.find(_secret(*sent))
            if key is None:
                raise Unauthenticated("the API key is unknown, or has expired")
            if len(self._good_keys) < _MOST_REMEMBERED:
                self._good_keys[sent] = key
        return key

    def ticket(self, key: Key) -> str:
        """Lets its bearer open streams with this key for `TICKET_SECONDS`."""
        digest = bytes.fromhex(key.sha256)[:_DIGEST]
        body = _TICKET.pack(digest, secrets.token_bytes(8), time.time() + TICKET_SECONDS)
        return base64.urlsafe_b64encode(body + self._signature(body)).decode().rstrip("=")

    def _key_of_ticket(self, ring: KeyRing, ticket: str) -> Key:
        try:
            content = base64.urlsafe_b64decode(ticket + "=" * (-len(ticket) % 4))
            body, signature = content[: _TICKET.size], content[_TICKET.size :]
            digest, _, expires = _TICKET.unpack(body)
        except (binascii.Error, ValueError, struct.error):
            raise Unauthenticated("the ticket is damaged") from None
        if not hmac.compare_digest(signature, self._signature(body)) or expires <= time.time():
            raise Unauthenticated("the ticket is unknown, or has expired: get another with POST /v1/tickets")
        for key in ring.keys.values():
            if bytes.fromhex(key.sha256)[:_DIGEST] == digest and not key.is_over():
                return key
        raise Unauthenticated("the ticket's API key is unknown by now, or has expired")

    def _signature(self, body: bytes) -> bytes:
        return hmac.digest(self._ticket_secret, body, "sha256")[:_SIGNATURE]

    @staticmethod
    def _permitted(key: Key, scope: Scope) -> str:
        if scope not in key.scopes:
            raise Forbidden(f"the API key {key.name!r} has not the scope {scope!r}, which this needs")
        return key.tenant


def _secret(name: bytes, value: bytes) -> bytes:
    """The key in a header. Raises Unauthenticated."""
    if name == b"x-api-key":
        return value
    if value[: len(_BEARER)].lower() != _BEARER:
        raise Unauthenticated("this server needs an API key: send it as Authorization: Bearer, or as X-API-Key")
    return value[len(_BEARER) :].strip()


def host_name(host: str) -> str:
    """The name in a header `Host`, without the port."""
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
