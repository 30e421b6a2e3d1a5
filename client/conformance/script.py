"""Conversations as their files have them: what the client is told, and what the server does to it meanwhile."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from unroll.client.conformance.refusals import Refusal

#: What a request over HTTP, or a message of a stream, asks for.
HTTP_KINDS = ("models", "model", "sequences", "open", "get", "close", "steps", "fork", "save", "restore", "rollout")
STREAM_KINDS = ("upgrade", "stream-open", "stream-close", "stream-detach", "frame", "stream-rollout", "stream-stop")

#: What the server does. docs/client-conformance.md says what each means.
DEEDS = (
    *("cut-before", "cut-after", "cut-inside", "late", "pieces", "refuse", "refuse-after", "restart", "end", "move"),
    *("chunked", "close-idle", "redirect", "foreign", "short", "no-position"),
    *("twice", "split", "closing", "stray", "noise", "unkept", "malformed", "too-large", "hold", "await-step"),
)

#: Seconds by which timers may be early.
_EARLY = 0.05
#: Seconds for which a client may take to end what it wants no more of.
_SETTLED = 5.0


class ScriptError(Exception):
    """A file of conversations is wrong; the message says where."""


@dataclass(frozen=True)
class Rule:
    """What the server does to the nth exchanges of one kind.

    Attributes:
        when: The kind.
        does: The deed.
        nth: Which of them, from 1; empty: every one.
        command: Only while the client runs its nth command, whatever it takes.
        code, status, retry_after: Of a refusal.
        seconds: Of `late`; of `restart`, how long nobody listens.
        kept: Whether sessions survive `restart`.
        steps: By how many `move` moves the session.
        handles: Of a frame: which entries are refused; empty: all.
        after: Of a rollout: how many answers come before it. The given time steps are one.
    """

    when: str
    does: str
    nth: tuple[int, ...] = (1,)
    command: int | None = None
    code: str = ""
    status: int = 0
    retry_after: float | None = None
    seconds: float = 0.0
    kept: bool = True
    steps: int = 1
    handles: tuple[int, ...] = ()
    after: int = 0

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Rule":
        """Raises ScriptError."""
        members = dict(document)
        nth = members.pop("nth", "every" if "command" in members else 1)
        members["nth"] = () if nth == "every" else tuple(nth) if isinstance(nth, list) else (nth,)
        members["handles"] = tuple(members.get("handles", ()))
        if unknown := members.keys() - {member.name for member in fields(cls)}:
            raise ScriptError(f"a rule has no member {min(unknown)!r}")
        rule = cls(**members)
        if rule.when not in (*HTTP_KINDS, *STREAM_KINDS):
            raise ScriptError(f"no exchange is called {rule.when!r}")
        if rule.does not in DEEDS:
            raise ScriptError(f"the server cannot do {rule.does!r}")
        return rule

    def refusal(self) -> Refusal:
        members = {} if self.retry_after is None else {"retry_after": self.retry_after}
        return Refusal(self.code, f"the script refuses with {self.code}", **members)

    def meets(self, count: int, command: int) -> bool:
        return (not self.nth or count in self.nth) and self.command in (None, command)


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        name, says: What must be true of the client.
        over: rest or stream: where its sessions are opened.
        client: The commands, with what is expected of their outcomes.
        server: The rules.
        given: Sessions that are open at the start: id and position.
        sees: How often each kind of exchange comes: exactly, or "2+".
        sessions: How many sessions are open at the end.
        needs: What not every client can see or do; one that cannot does not support the conversation.
        timeout, retry_for: Seconds, of the client.
    """

    name: str
    says: str
    over: Literal["rest", "stream"]
    client: tuple[dict[str, Any], ...]
    server: tuple[Rule, ...] = ()
    given: Mapping[str, int] = field(default_factory=dict)
    sees: Mapping[str, int | str] = field(default_factory=dict)
    sessions: int | None = None
    needs: Sequence[str] = ()
    timeout: float = 20.0
    retry_for: float = 60.0

    @classmethod
    def of(cls, over: str, document: Mapping[str, Any]) -> "Conversation":
        """Raises ScriptError."""
        name = document.get("name", "a conversation without a name")
        try:
            rules = tuple(Rule.of(rule) for rule in document.get("server", ()))
            return cls(**{**document, "over": over, "server": rules, "client": tuple(document["client"])})
        except (ScriptError, TypeError, KeyError) as error:
            raise ScriptError(f"{name}: {error}") from error


def read_conversations(paths: Iterable[Path]) -> list[Conversation]:
    """Each file is named after where its sessions are opened: rest.yaml, stream.yaml. Raises ScriptError."""
    return [
        Conversation.of(path.stem, document)
        for path in paths
        for document in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


class Script:
    """The server's part in one conversation, and what it has seen so far.

    Attributes:
        command: The number of the client's command.
        counts: Exchanges by kind.
        faults: What the client did that no client may do.
        holds: Rollouts that wait until the client ends them.
        stepped: Steps have come since a rollout began.
    """

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = tuple(rules)
        self._not_before: dict[tuple[str, object], float] = {}
        self.command = 0
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.holds: list[asyncio.Future[None]] = []
        self.stepped = asyncio.Event()

    def hold(self) -> asyncio.Future[None]:
        """Done when the client has ended the rollout."""
        self.holds.append(asyncio.get_running_loop().create_future())
        return self.holds[-1]

    async def settle(self) -> None:
        """Note a fault if the client has left a rollout running."""
        if self.holds and (await asyncio.wait(self.holds, timeout=_SETTLED))[1]:
            self.faults.append("a rollout still runs, of which the client wants no more")

    async def await_step(self, ended: Coroutine[Any, Any, object]) -> None:
        """Wait until steps come. Note a fault if none do. ended: is awaited until the client has ended the rollout."""
        waiting = [asyncio.create_task(self.stepped.wait()), asyncio.create_task(ended)]
        await asyncio.wait(waiting, timeout=_SETTLED, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not self.stepped.is_set():
            self.faults.append("no session was stepped while a rollout ran")

    def meets(self, kind: str) -> list[Rule]:
        """Count an exchange. Returns the rules for it, in the order of the file."""
        self.counts[kind] += 1
        if kind in ("steps", "frame"):
            self.stepped.set()
        return [rule for rule in self._rules if rule.when == kind and rule.meets(self.counts[kind], self.command)]

    def asked_to_wait(self, kind: str, key: object, seconds: float) -> None:
        self._not_before[kind, key] = time.monotonic() + seconds

    def comes(self, kind: str, key: object) -> None:
        """Note a fault if it was asked to wait for longer. key: whom the exchange is about."""
        early = self._not_before.pop((kind, key), 0.0) - time.monotonic()
        if early > _EARLY:
            self.faults.append(f"{kind} of {key!r} came again {early:.2f} s before Retry-After had passed")
