"""Tickets: what a web page, which cannot send a header with a WebSocket, opens streams with."""

import base64
import hmac
import secrets
import struct
import time
from datetime import UTC, datetime

from unroll.service.access.keys import JwtKey, Key
from unroll.service.core.errors import Unauthenticated

#: A browser offers this protocol, followed by a ticket.
TICKET_PROTOCOL = "unroll.ticket."
TICKET_SECONDS = 30.0
#: First bytes of the digest of the key, nonce, end in Unix time; then, of a JWT, the key as JSON; then the signature.
_TICKET = struct.Struct("<16s8sd")
_DIGEST = 16
_SIGNATURE = 16


class Tickets:
    """Makes and reads them. secret: Servers that take each other's tickets have the same; None for a random one."""

    def __init__(self, secret: bytes | None) -> None:
        self._secret = hmac.digest(secret or secrets.token_bytes(32), b"tickets", "sha256")

    def issue(self, key: Key) -> tuple[str, float]:
        """A ticket that opens streams with this key, and for how many seconds: no longer than the key is good."""
        seconds = TICKET_SECONDS
        if key.expires is not None:
            seconds = max(0.0, min(seconds, (key.expires - datetime.now(UTC)).total_seconds()))
        digest = bytes.fromhex(key.sha256)[:_DIGEST]
        whole = key.model_dump_json().encode() if isinstance(key, JwtKey) else b""  # another server has not seen it
        body = _TICKET.pack(digest, secrets.token_bytes(8), time.time() + seconds) + whole
        return base64.urlsafe_b64encode(body + self._signature(body)).decode().rstrip("="), seconds

    def open(self, ticket: str) -> tuple[bytes, JwtKey | None]:
        """The first bytes of the digest of its key; the key itself if it is a JWT's. Raises Unauthenticated."""
        try:
            content = base64.urlsafe_b64decode(ticket + "=" * (-len(ticket) % 4))
            body, signature = content[:-_SIGNATURE], content[-_SIGNATURE:]
            digest, _, expires = _TICKET.unpack_from(body)
        except (ValueError, struct.error):
            raise Unauthenticated("the ticket is damaged") from None
        if not hmac.compare_digest(signature, self._signature(body)) or expires <= time.time():
            raise Unauthenticated("the ticket is unknown, or has expired: get another with POST /v1/tickets")
        whole = body[_TICKET.size :]
        return digest, JwtKey.model_validate_json(whole) if whole else None

    def _signature(self, body: bytes) -> bytes:
        return hmac.digest(self._secret, body, "sha256")[:_SIGNATURE]
