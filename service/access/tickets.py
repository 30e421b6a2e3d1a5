"""Tickets let web pages open streams, because pages cannot send headers with a WebSocket."""

import base64
import hmac
import secrets
import struct
import time
from datetime import UTC, datetime

from unroll.service.access.keys import JwtKey, Key
from unroll.service.core.errors import Unauthenticated

#: Prefix of the subprotocol in which a browser offers a ticket.
TICKET_PROTOCOL = "unroll.ticket."
TICKET_SECONDS = 30.0
#: Prefix of the key's digest, nonce, expiry in Unix time; then, for a JWT, the key as JSON; then the signature.
_TICKET = struct.Struct("<16s8sd")
_DIGEST = 16
_SIGNATURE = 16


class Tickets:
    """Issues and opens tickets. secret: shared by servers that accept each other's tickets; None for a random one."""

    def __init__(self, secret: bytes | None) -> None:
        self._secret = hmac.digest(secret or secrets.token_bytes(32), b"tickets", "sha256")

    def issue(self, key: Key) -> tuple[str, float]:
        """Issue a ticket for this key. Returns it and its lifetime in seconds, limited by the key's own."""
        seconds = TICKET_SECONDS
        if key.expires is not None:
            seconds = max(0.0, min(seconds, (key.expires - datetime.now(UTC)).total_seconds()))
        digest = bytes.fromhex(key.sha256)[:_DIGEST]
        whole = key.model_dump_json().encode() if isinstance(key, JwtKey) else b""  # another server may not know it
        body = _TICKET.pack(digest, secrets.token_bytes(8), time.time() + seconds) + whole
        return base64.urlsafe_b64encode(body + self._signature(body)).decode().rstrip("="), seconds

    def open(self, ticket: str) -> tuple[bytes, JwtKey | None]:
        """The prefix of its key's digest; also the key itself if that is a JWT's. Raises Unauthenticated."""
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
