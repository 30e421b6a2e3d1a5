"""The ids of sessions, and whose they are. Inside the server the id of a tenant's session begins with its tenant:

    U+001D  tenant  U+001D  the id as its client knows it

So two tenants' sessions of one id are two sessions everywhere: in memory, in every store, in a snapshot that a client
holds. Without keys there are no tenants, and ids are as clients send them. What clients read is `shown`.
"""

import secrets
from dataclasses import dataclass

from unroll.service.core.errors import InvalidRequest

_MARK = "\x1d"
#: Characters of an id.
_MOST_CHARACTERS = 128
#: Random bytes in a generated id: 128 bits.
_ID_BYTES = 16


def owned(tenant: str, session_id: str) -> str:
    """The id inside the server. Raises InvalidRequest for an id that looks like a tenant's."""
    if session_id.startswith(_MARK):
        raise InvalidRequest("a session id must not begin with the control character U+001D")
    return mark(tenant) + session_id if tenant else session_id


def mark(tenant: str) -> str:
    """What the ids of its sessions begin with."""
    return f"{_MARK}{tenant}{_MARK}"


@dataclass(frozen=True, slots=True)
class NewId:
    """The id of a session to open. is_random: nobody else can have it."""

    id: str
    is_random: bool

    @property
    def requested(self) -> str | None:
        return None if self.is_random else self.id


def new_id(tenant: str, requested: str | None) -> NewId:
    """The requested id, or a random one. Raises InvalidRequest."""
    own = owned(tenant, secrets.token_urlsafe(_ID_BYTES) if requested is None else requested)
    check_id(own)
    return NewId(own, requested is None)


def check_id(session_id: str) -> None:
    """Raises InvalidRequest for what cannot be a session id."""
    size = len(shown(session_id))
    if not 1 <= size <= _MOST_CHARACTERS:
        raise InvalidRequest(f"a session id has 1 to {_MOST_CHARACTERS} characters, this one has {size}")


def shown(session_id: str) -> str:
    """The id as its client knows it."""
    return session_id.split(_MARK, 2)[2] if session_id.startswith(_MARK) else session_id


def tenant_of(session_id: str) -> str:
    """The tenant whose session it is; empty without keys."""
    return session_id.split(_MARK, 2)[1] if session_id.startswith(_MARK) else ""
