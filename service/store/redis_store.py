"""Durable sessions in Redis, Valkey, or a Redis Cluster.

    PREFIX:{MODEL/SESSION}        token, then the record as in `record.py`; lives for the idle timeout
    PREFIX:{MODEL/SESSION}:gone   `e` or `c`, token, position u64, origin, last; lives at least half the tombstone life
                                  longer than the session. `e` (expired) is written with the session, and is true as
                                  soon as the first key has expired. `c`: the session was closed. `t`, token: it was
                                  taken; kept for minutes, so that a repeated call is recognised

The braces keep both keys of a session on one node of a cluster.

Every access to a session is one call of a function on these two keys, so it is atomic. Concurrent calls share one run
of a script, which executes them in order; each succeeds or fails by itself. How many writes a crash of Redis loses
depends on its `appendfsync`.

If the connection breaks, its calls are sent once more. The script recognises a call that it has already executed,
unless another replica has written since; then it refuses the call. So if the second attempt is refused, the outcome is
unknown.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import structlog
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError

from unroll.service.core.errors import SessionClosed, SessionExpired, SnapshotInvalid, StoreUnavailable, UnrollError
from unroll.service.store.exchanges import Exchanges, unavailable
from unroll.service.store.interface import Commit, Key, Page, Store, StoreRefused, Tokens, refused_commit
from unroll.service.store.record import ORIGIN_BYTES, Gone, Origin, Record, pack_last, unpack_last, unpack_trace
from unroll.service.store.redis_client import FAILURES, LOST, connect, disconnect, eviction_policy, refusal
from unroll.service.store.redis_listing import read_page

T = TypeVar("T")

_log = structlog.get_logger(__name__)

#: Concurrent exchanges with Redis; further calls wait and share the next one.
_EXCHANGES = 2
#: Maximum calls and bytes per run of the script, because Redis does nothing else while it runs.
_MOST_CALLS, _MOST_BYTES = 128, 2**20
#: Seconds between attempts at the start, for an answer to one, and between checks of the eviction policy.
_ATTEMPT_SECONDS, _PATIENCE_SECONDS, _LOOK_SECONDS = 1.0, 5.0, 60.0

# A call is one word: function, expected token, token, content. A missing token is zeros. `b` writes a session's first
# record. A refused write returns the state. `f` and `c` return the position if they closed the session: `f` after a
# step; `c` in any state, if it has the given origin or none is given. `c` succeeds without memory for a tombstone; `f`
# does not, since the tombstone has the step's reply. The SET before the calls only makes a read-only replica, which may
# be stale, refuse all calls.
_SCRIPT = """
local call, does, sub, none = redis.call, {}, string.sub, string.rep('\\0', 16)
function does.w(state, gone, expected, token, word, begins)
  local held = call('GETRANGE', state, 0, 15)
  if held == token then return 1 end
  if held ~= expected then return call('GET', state) end
  call('SET', state, sub(word, 18)%(idle)s)
  if begins then
    call('SET', gone, 'e' .. string.rep('\\0', 24) .. sub(word, 34, 105)%(both)s)
%(longer)s
  end
  return 1
end
function does.b(state, gone, expected, token, word)
  return does.w(state, gone, expected, token, word, true)
end
function does.f(state, gone, expected, token, word)
  if call('GETRANGE', gone, 1, 16) == token then return call('GETRANGE', gone, 17, 24) end
  if call('GETRANGE', state, 0, 15) ~= expected then return false end
  call('SET', gone, 'c' .. sub(word, 18), 'PX', %(tombstone)d)
  call('DEL', state)
  return sub(word, 34, 41)
end
function does.c(state, gone, expected, token, word)
  if call('GETRANGE', gone, 1, 16) == token then return call('GETRANGE', gone, 17, 24) end
  local held, meant = call('GETRANGE', state, 0, 95), sub(word, 42)
  local origin, position = sub(held, 17, 88), sub(held, 89)
  if held == '' or (meant ~= '' and meant ~= origin) then return false end
  local kept = redis.pcall('SET', gone, 'c' .. token .. position .. origin .. sub(word, 34, 41), 'PX', %(tombstone)d)
  if kept.err then
    if not string.find(kept.err, 'OOM') then return kept end
    call('DEL', gone)
  end
  call('DEL', state)
  return position
end
function does.l(state, gone)
  return {call('GET', state), call('GET', gone)}
end
function does.t(state, gone, expected, token)
  if call('GETRANGE', gone, 0, 16) == 't' .. token then return 1 end
  if call('GETRANGE', state, 0, 15) ~= expected then return 0 end
  call('DEL', state, gone)
  redis.pcall('SET', gone, 't' .. token, 'PX', 600000)
  return 1
end
local able = redis.pcall('SET', KEYS[1] .. ':never', '', 'XX')
if able and able.err and string.find(able.err, 'READONLY') then return able end
local replies = {}
for i, word in ipairs(ARGV) do
  local state, gone, expected, token = KEYS[2 * i - 1], KEYS[2 * i], sub(word, 2, 17), sub(word, 18, 33)
  if expected == none then expected = '' end
  local good, reply = pcall(does[sub(word, 1, 1)], state, gone, expected, token, word)
  if not good and type(reply) ~= 'table' then reply = redis.error_reply(reply) end
  replies[i] = reply
end
return replies
"""
# Only when due, because it costs as much as the rest.
_LONGER = """  elseif call('PTTL', gone) < %d then
    call('PEXPIRE', gone, %d)"""

_WRITE, _BEGIN, _FINISH, _CLOSE, _LOAD, _TAKE = b"w", b"b", b"f", b"c", b"l", b"t"
_CLOSED, _TAKEN = b"c", b"t"
_TOKEN = 16
_NO_TOKEN = bytes(_TOKEN)

#: A call of a function in the script: the keys and the word.
_Call = tuple[tuple[bytes, bytes], bytes]


@dataclass(frozen=True, slots=True)
class RedisStoreConfig:
    """The settings of a Redis store.

    Attributes:
        timeout: Seconds to wait for an answer.
        idle_timeout: Seconds until an idle session expires; None for never.
        tombstone_life: Seconds for which the end of a session is remembered.
        prefix: Prefix of all keys. Deployments with different prefixes can share a Redis.
    """

    url: str
    timeout: float = 0.5
    idle_timeout: float | None = 900.0
    tombstone_life: float = 3600.0
    prefix: str = "unroll"


class RedisStore(Store):
    """Raises StoreRefused if the URL is invalid."""

    def __init__(self, config: RedisStoreConfig) -> None:
        self._config = config
        self._client: Any = connect(config.url, config.timeout)
        self._tokens = Tokens()
        self._watching: asyncio.Task[None] | None = None
        self._exchanges = Exchanges(self._execute, FAILURES, config.timeout, most=_EXCHANGES, cancels=True)
        self.figures = self._exchanges.figures
        self._script = _with_lives(config).encode()
        self._digest = hashlib.sha1(self._script, usedforsecurity=False).hexdigest().encode()

    async def start(self) -> None:
        while True:
            try:
                await self.check()
                break
            except StoreUnavailable as error:
                self._exchanges.note(error)
            await asyncio.sleep(_ATTEMPT_SECONDS)
        self._exchanges.note(None)
        await self._look_for_eviction()
        self._watching = asyncio.create_task(self._watch(), name="store")

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self._exchanges.finish()
        await disconnect(self._client)

    async def check(self) -> None:
        """Write, read and remove a key. A server without free memory passes. Raises StoreUnavailable, StoreRefused."""
        token = self._tokens.next()
        calls: list[_Call] = []
        for n in range(2):  # keys of different slots, if it is a cluster
            key = "", f"{token.hex()}{n}"
            calls += [self._call(key, _WRITE, b"", token), self._call(key, _LOAD), self._call(key, _TAKE, token)]
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                replies = await self._execute(calls)
            wrong = [r for r in replies if isinstance(r, RedisError) and not isinstance(r, OutOfMemoryError)]
            if wrong:
                raise wrong[0]
        except FAILURES as reason:
            if (why := refusal(self._client, reason)) is not None:
                raise StoreRefused(f"the session store refuses this server: {why}") from reason
            raise unavailable(reason) from reason

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._look_for_eviction()

    async def _look_for_eviction(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                policy = await eviction_policy(self._client)
        except FAILURES:
            return  # it does not answer, or does not report the policy
        if policy is not None and not self.figures.evicts:
            remedy = "set its maxmemory-policy to noeviction"
            _log.warning("the store removes sessions when it is full", policy=policy, remedy=remedy)
        self.figures.evicts = policy is not None

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        return await self._exchanges.counted(len(commits), self._write(commits))

    async def _write(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        replies = await self._exchanges.ask([self._call_of(commit) for commit in commits])
        both = zip(commits, replies, strict=True)
        return [None if reply == 1 else _verdict(commit, reply) for commit, reply in both]

    async def load_all(self, keys: Sequence[Key]) -> list[Record | Gone | UnrollError | None]:
        return [self._found(reply) for reply in await self._exchanges.ask([self._call(key, _LOAD) for key in keys])]

    def _found(self, reply: Any) -> Record | Gone | UnrollError | None:
        if isinstance(reply, RedisError):
            return unavailable(reply)
        state, gone = reply
        try:
            if state is not None:
                return _read_state(state)
            if gone is None or gone[:1] == _TAKEN or (gone[:1] != _CLOSED and self.figures.evicts):
                return None  # where sessions are evicted, this one need not have expired
            return _read_gone(gone)
        except SnapshotInvalid as error:
            return error

    async def close(self, key: Key, origin: bytes = b"") -> int | None:
        call = self._call(key, _CLOSE, b"", self._tokens.next(), pack_last(1, ()) + origin)
        position = await self._exchanges.ask_one(call)
        return None if position is None else int.from_bytes(position, "little")

    async def take(self, key: Key, token: bytes, attempt: bytes = b"") -> bool:
        call = self._call(key, _TAKE, token, attempt or self._tokens.next())  # the same if it is resent
        return bool(await self._exchanges.ask_one(call))

    def _call(
        self, key: Key, function: bytes, expected: bytes = b"", token: bytes = b"", content: bytes = b""
    ) -> _Call:
        state = f"{self._config.prefix}:{{{key[0]}/{key[1]}}}".encode()
        word = b"".join((function, expected or _NO_TOKEN, token or _NO_TOKEN, content))
        return (state, state + b":gone"), word

    def _call_of(self, commit: Commit) -> _Call:
        if not commit.ends:
            function, content = _BEGIN if commit.begins else _WRITE, commit.content
        else:
            origin, position, last = unpack_trace(commit.content)
            function, content = _FINISH, position.to_bytes(8, "little") + origin + last
        return self._call(commit.key, function, commit.expected, commit.token, content)

    async def page(self, after: str, limit: int, tenant: str | None = None) -> Page:
        try:
            async with asyncio.timeout(self._config.timeout):
                read = partial(read_page, self._client, self._config.prefix, after, limit, tenant)
                return (await self._ask(read))[0]
        except FAILURES as error:
            raise unavailable(error) from error

    async def _execute(self, calls: Sequence[_Call]) -> list[Any]:
        if isinstance(self._client, RedisCluster):
            return await self._send(self._execute_apart, calls)
        return [reply for part in _parts(calls) for reply in await self._send(self._execute_together, part)]

    async def _send(
        self, execute: Callable[[Sequence[_Call]], Awaitable[list[Any]]], calls: Sequence[_Call]
    ) -> list[Any]:
        replies, lost = await self._ask(partial(execute, calls))
        if lost is None:
            return replies
        return [lost if _is_refused(call[1][:1], reply) else reply for call, reply in zip(calls, replies, strict=True)]

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> tuple[T, RedisError | None]:
        """Return the answer, and the first attempt's error if a second was needed."""
        try:
            return await ask(), None
        except LOST as lost:
            if isinstance(self._client, RedisCluster):
                await self._client.aclose()  # so that it discovers the nodes again
            return await ask(), lost

    async def _execute_together(self, calls: Sequence[_Call]) -> list[Any]:
        try:
            return await self._client.execute_command("EVALSHA", self._digest, *_words(calls))
        except NoScriptError:
            return await self._client.execute_command("EVAL", self._script, *_words(calls))

    async def _execute_apart(self, calls: Sequence[_Call]) -> list[Any]:
        """Run each call separately, in one pipeline per node: in a cluster, a script's keys must share a slot."""
        replies = await self._pipelined(calls, "EVALSHA", self._digest)
        if unknown := [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]:
            again = await self._pipelined([calls[i] for i in unknown], "EVAL", self._script)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return [reply[0] if isinstance(reply, list) else reply for reply in replies]

    async def _pipelined(self, calls: Sequence[_Call], command: str, script: bytes) -> list[Any]:
        pipeline = self._client.pipeline()
        for call in calls:
            pipeline.execute_command(command, script, *_words([call]))
        return await pipeline.execute(raise_on_error=False)


def _words(part: Sequence[_Call]) -> list[bytes]:
    """The arguments after the script: number of keys, the keys, and the words."""
    keys, words = zip(*part, strict=True)
    return [b"%d" % (2 * len(part)), *chain(*keys), *words]


def _parts(calls: Sequence[_Call]) -> Iterator[Sequence[_Call]]:
    """Split calls into runs of the script: at most _MOST_CALLS each, and fewer if they are large."""
    begin = size = 0
    for end, (_, word) in enumerate(calls):
        size += len(word)
        if end - begin == _MOST_CALLS or (size > _MOST_BYTES and end > begin):
            yield calls[begin:end]
            begin, size = end, len(word)
    yield calls[begin:]


def _with_lives(config: RedisStoreConfig) -> str:
    """The script with the lifetimes of the keys. State keys have none if sessions never expire."""
    tombstone = _milliseconds(config.tombstone_life)
    if config.idle_timeout is None:
        return _SCRIPT % {"idle": "", "both": "", "longer": "", "tombstone": tombstone}
    idle = _milliseconds(config.idle_timeout)
    both = idle + tombstone
    longer = _LONGER % (idle + tombstone // 2, both)
    return _SCRIPT % {"idle": f", 'PX', {idle}", "both": f", 'PX', {both}", "longer": longer, "tombstone": tombstone}


def _read_state(content: bytes) -> Record:
    return Record.unpack(content[_TOKEN:], content[:_TOKEN])


def _read_gone(content: bytes) -> Gone:
    begin = 1 + _TOKEN + 8
    origin, last = content[begin : begin + ORIGIN_BYTES], content[begin + ORIGIN_BYTES :]
    cause = SessionClosed if content[:1] == _CLOSED else SessionExpired
    return Gone(cause.code, Origin.from_bytes(origin), unpack_last(last)[0] if last else ())


def _verdict(commit: Commit, reply: Any) -> UnrollError | None:
    if isinstance(reply, RedisError):
        return unavailable(reply)
    if not _is_refused(_FINISH if commit.ends else _WRITE, reply):
        return None
    try:
        return refused_commit(commit.key, None if reply is None else _read_state(reply))
    except SnapshotInvalid:
        return refused_commit(commit.key, None)


def _is_refused(function: bytes, reply: Any) -> bool:
    """Whether the store had another token for the session."""
    if isinstance(reply, RedisError):
        return False
    return reply != 1 if function in (_WRITE, _BEGIN) else not reply


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
