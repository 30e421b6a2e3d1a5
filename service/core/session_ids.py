"""Session ids. Inside the server, the id of a tenant's session starts with its tenant:

    U+001D  tenant  U+001D  the client's id

Therefore equal ids of two tenants are different sessions everywhere: in memory, in every store, and in client-held
snapshots. Without keys there are no tenants, and internal ids equal the clients' ids. `shown` returns the client's id.
"""

import secrets
from dataclasses import dataclass

from unroll.service.core.errors import InvalidRequest

_MARK = "\x1d"
#: Maximum length of an id.
_MOST_CHARACTERS = 128
#: Random bytes in a generated id: 128 bits.
_ID_BYTES = 16


def owned(tenant: str, session_id: str) -> str:
    """The internal id. Raises InvalidRequest for an id that looks like an internal one."""
    if session_id.startswith(_MARK):
        raise InvalidRequest("a session id must not start with the control character U+001D")
    return mark(tenant) + session_id if tenant else session_id


def mark(tenant: str) -> str:
    """The prefix of the tenant's internal ids."""
    return f"{_MARK}{tenant}{_MARK}"


@dataclass(frozen=True, slots=True)
class NewId:
    """The internal id of a session to open. requested: the same; None for a generated one, which is unique."""

    id: str
    requested: str | None


def new_id(tenant: str, requested: str | None) -> NewId:
    """The internal id for a requested id, or a random one. Raises InvalidRequest."""
    own = owned(tenant, secrets.token_urlsafe(_ID_BYTES) if requested is None else requested)
    check_id(own)
    return NewId(own, None if requested is None else own)


def check_id(session_id: str) -> None:
    """Raises InvalidRequest for an invalid session id."""
    size = len(shown(session_id))
    if not 1 <= size <= _MOST_CHARACTERS:
        raise InvalidRequest(f"a session id must have 1 to {_MOST_CHARACTERS} characters, not {size}")


def shown(session_id: str) -> str:
    """The client's id for an internal id."""
    return session_id.split(_MARK, 2)[2] if session_id.startswith(_MARK) else session_id


def tenant_of(session_id: str) -> str:
    """The tenant in an internal id; empty without keys."""
    return session_id.split(_MARK, 2)[1] if session_id.startswith(_MARK) else ""
