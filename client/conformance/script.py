"""Reads conversations: the client's commands, and the server's scripted behaviour."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from unroll.client.conformance.refusals import Refusal

#: The kinds of HTTP requests and stream messages.
HTTP_KINDS = ("models", "model", "sequences", "open", "get", "close", "steps", "fork", "save", "restore", "rollout")
STREAM_KINDS = ("upgrade", "stream-open", "stream-close", "stream-detach", "frame", "stream-rollout", "stream-stop")

#: The server's actions, as documented in docs/client-conformance.md.
DEEDS = (
    *("cut-before", "cut-after", "cut-inside", "late", "pieces", "refuse", "refuse-after", "restart", "end", "move"),
    *("chunked", "close-idle", "redirect", "foreign", "short", "no-position"),
    *("twice", "split", "closing", "stray", "noise", "unkept", "malformed", "too-large", "hold", "await-step"),
)

#: Tolerance in seconds for timers that fire early.
_EARLY = 0.05
#: Seconds that a client may take to end a rollout that it no longer reads.
_SETTLED = 5.0


class ScriptError(Exception):
    """A file of conversations is invalid; the message says where."""


@dataclass(frozen=True)
class Rule:
    """An action of the server on some exchanges of one kind.

    Attributes:
        when: The kind of exchange.
        does: The action.
        nth: The numbers of the exchanges, from 1; empty for all of them.
        command: Restricts the rule to the client's command with this number.
        code, status, retry_after: The members of a refusal.
        seconds: The delay of `late`, or the downtime of `restart`.
        kept: Whether sessions survive `restart`.
        steps: How many steps `move` advances the session.
        handles: The entries of a frame to refuse; empty for all.
        after: For a rollout, how many answers precede the action; the given time steps count as one.
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
        """Parse a rule. Raises ScriptError."""
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
        name: Its name.
        says: The property of the client that it tests.
        over: Where sessions are opened: rest or stream.
        client: The commands, with their expected outcomes.
        server: The server's rules.
        given: The sessions that are open at the start, as id and position.
        sees: The expected number of exchanges per kind: exact, or a minimum such as "2+".
        sessions: The expected number of open sessions at the end.
        needs: Optional features; a client without them does not support the conversation.
        timeout, retry_for: The client's settings, in seconds.
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
        """Parse a conversation. Raises ScriptError."""
        name = document.get("name", "a conversation without a name")
        try:
            rules = tuple(Rule.of(rule) for rule in document.get("server", ()))
            return cls(**{**document, "over": over, "server": rules, "client": tuple(document["client"])})
        except (ScriptError, TypeError, KeyError) as error:
            raise ScriptError(f"{name}: {error}") from error


def read_conversations(paths: Iterable[Path]) -> list[Conversation]:
    """Read files, rest.yaml or stream.yaml, named after the place where sessions are opened. Raises ScriptError."""
    return [
        Conversation.of(path.stem, document)
        for path in paths
        for document in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


class Script:
    """The server's part in one conversation, and its observations.

    Attributes:
        command: The number of the client's current command.
        counts: The number of exchanges by kind.
        faults: Violations of the protocol by the client.
        holds: Rollouts that wait until the client ends them.
        stepped: Set when steps arrive after a rollout began.
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
        """A future to complete when the client has ended the rollout."""
        self.holds.append(asyncio.get_running_loop().create_future())
        return self.holds[-1]

    async def settle(self) -> None:
        """Record a fault if the client left a rollout running."""
        if self.holds and (await asyncio.wait(self.holds, timeout=_SETTLED))[1]:
            self.faults.append("the client left a rollout running that it no longer reads")

    async def await_step(self, ended: Coroutine[Any, Any, object]) -> None:
        """Wait for steps, or for `ended`: the end of the rollout. Record a fault if no steps arrive."""
        waiting = [asyncio.create_task(self.stepped.wait()), asyncio.create_task(ended)]
        await asyncio.wait(waiting, timeout=_SETTLED, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not self.stepped.is_set():
            self.faults.append("no session was stepped while a rollout ran")

    def meets(self, kind: str) -> list[Rule]:
        """Count an exchange. Returns its rules, in the order of the file."""
        self.counts[kind] += 1
        if kind in ("steps", "frame"):
            self.stepped.set()
        return [rule for rule in self._rules if rule.when == kind and rule.meets(self.counts[kind], self.command)]

    def asked_to_wait(self, kind: str, key: object, seconds: float) -> None:
        self._not_before[kind, key] = time.monotonic() + seconds

    def comes(self, kind: str, key: object) -> None:
        """Record a fault if an exchange arrives before Retry-After has passed; `key` is its subject."""
        early = self._not_before.pop((kind, key), 0.0) - time.monotonic()
        if early > _EARLY:
            self.faults.append(f"{kind} of {key!r} came again {early:.2f} s before Retry-After had passed")
