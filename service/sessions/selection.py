"""Selects sessions for operators, and formats them."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from unroll.service.core.errors import InvalidRequest
from unroll.service.core.session_ids import shown, tenant_of
from unroll.service.store.interface import Key, Listed, Pages

_PAGE = 500
#: Maximum number of pages to read for one answer.
_MOST_PAGES = 20


@dataclass(frozen=True, slots=True)
class Selection:
    """Criteria for sessions. `None` means any model or tenant.

    min_idle: seconds. idle_timeout: the servers' setting, which is needed to compute idle times.
    """

    model: str | None = None
    min_idle: float | None = None
    min_position: int = 0
    max_position: int | None = None
    idle_timeout: float | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        if self.min_idle is not None and self.idle_timeout is None:
            raise InvalidRequest("the idle time of sessions that never expire is unknown: remove --min-idle")

    def of(self, session: Listed) -> "Selected | None":
        selected = Selected(session, _idle(session, self.idle_timeout))
        if not self.has(session.key):
            return None
        if session.position < self.min_position:
            return None
        if self.max_position is not None and session.position > self.max_position:
            return None
        if self.min_idle is not None and (selected.idle is None or selected.idle < self.min_idle):
            return None
        return selected

    def has(self, key: Key) -> bool:
        """Whether a session with this key can match."""
        return self.model in (None, key[0]) and self.tenant in (None, tenant_of(key[1]))


@dataclass(frozen=True, slots=True)
class Selected:
    """idle: seconds since the last commit; None if the session never expires."""

    session: Listed
    idle: float | None

    def document(self) -> dict[str, Any]:
        model, session_id = self.session.key
        return {
            **named((model, session_id)),
            "position": self.session.position,
            "durability": self.session.durability,
            "digest": self.session.digest,
            "idle_seconds": None if self.idle is None else round(self.idle, 1),
            "expires_in_seconds": None if self.session.expires_in is None else round(self.session.expires_in, 1),
            "bytes": self.session.bytes,
        }

    def line(self) -> str:
        model, session_id = self.session.key
        idle = "never expires" if self.idle is None else f"idle {self.idle:.0f} s"
        tenant = f"{found}  " if (found := tenant_of(session_id)) else ""
        name = f"{model}  {tenant}{describe(shown(session_id))}"
        return f"{name}  position {self.session.position}  {idle}  {self.session.bytes} bytes"


@dataclass(slots=True)
class Found:
    sessions: list[Selected] = field(default_factory=list)
    damaged: list[Key] = field(default_factory=list)

    def document(self, after: str) -> dict[str, Any]:
        """after: name of the next page; empty if there is none."""
        return {
            "sessions": [selected.document() for selected in self.sessions],
            "damaged": [named(key) for key in self.damaged],
            "after": after or None,
        }


async def select(pages: Pages, selection: Selection, after: str, limit: int) -> tuple[Found, str]:
    """Return at most `limit` sessions, and the name of the next page; empty if there is none.

    The result may be short or empty although there are more, because the number of pages read is limited.

    Raises:
        StoreUnavailable: The store does not answer.
        InvalidRequest: There is no page `after`.
    """
    found, seen = Found(), set[Key]()
    for _ in range(_MOST_PAGES):
        page = await pages.page(after, limit - len(found.sessions), selection.tenant)
        await asyncio.sleep(0)
        for listed in page.sessions:
            if listed.key not in seen and (selected := selection.of(listed)) is not None:
                found.sessions.append(selected)
            seen.add(listed.key)
        found.damaged += [key for key in page.damaged if selection.has(key)]
        after = page.after
        if not after or len(found.sessions) >= limit:
            break
    return found, after


async def every(pages: Pages, selection: Selection) -> AsyncIterator[Found]:
    after = ""
    while True:
        found, after = await select(pages, selection, after, _PAGE)
        yield found
        if not after:
            return


def describe(text: str) -> str:
    """Escape a client's text so that it fits on one line."""
    return text if text.isprintable() and " " not in text else json.dumps(text)


def named(key: Key) -> dict[str, Any]:
    """Model, tenant and session id as members of a document."""
    model, session_id = key
    tenant = {"tenant": tenant_of(session_id)} if tenant_of(session_id) else {}
    return {"model": model, **tenant, "session_id": shown(session_id)}


def _idle(session: Listed, idle_timeout: float | None) -> float | None:
    if session.expires_in is None or idle_timeout is None:
        return None
    return max(0.0, idle_timeout - session.expires_in)
