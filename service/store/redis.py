"""Durable sessions in Redis, Valkey, or a Redis Cluster.

    unroll:{MODEL/SESSION}        token, and the record as in `record.py`; lives for the idle timeout
    unroll:{MODEL/SESSION}:gone   `e` or `c`, token, position u64, origin, last; lives longer than the session by half
                                  the tombstone life at least. `e`, from the beginning: it expired, which is true as
                                  soon as the first key is gone by itself; `c`: it was closed

The braces keep both keys of a session on one node of a cluster.

Every access is one script on these two keys, so it happens whole or not at all. What many ask at the same moment leaves
in one pipeline. How much of it a crash of Redis loses is for its `appendfsync` to say.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from service.core.errors import SessionClosed, SessionContended, SessionExpired, StoreUnavailable, UnrollError
from service.store.base import Commit, Key, Tokens
from service.store.record import ORIGIN_BYTES, Gone, Origin, Record, pack, pack_last, unpack_last

_log = structlog.get_logger(__name__)

#: Pipelines under way at a time; what comes meanwhile leaves in the next.
_PIPELINES = 2
#: Seconds after which a client may find the store again.
_RETRY_AFTER = 1.0
#: `expected` of what does not care.
_ANY = b"*"
_CLUSTER = "redis+cluster://"

# ARGV: expected, token, record, and `gone` of a session that begins
_WRITE = """
local held = redis.call('GETRANGE', KEYS[1], 0, 15)
if held == ARGV[2] then return 1 end
if held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2] .. ARGV[3]%(idle)s)
if ARGV[4] then
  redis.call('SET', KEYS[2], ARGV[4]%(both)s)
%(longer)s
end
return 1
"""
# Now and then: it costs as much as the rest.
_LONGER = """elseif redis.call('PTTL', KEYS[2]) < %d then
  redis.call('PEXPIRE', KEYS[2], %d)"""

# ARGV: expected or '*', token, milliseconds, last, and position and origin, if they are not to be what they are
# Returns the position, if the session is ended.
_END = """
if redis.call('GETRANGE', KEYS[2], 1, 16) == ARGV[2] then return redis.call('GETRANGE', KEYS[2], 17, 24) end
local held = redis.call('GETRANGE', KEYS[1], 0, 15)
if ARGV[1] == '*' and held == '' then return false end
if ARGV[1] ~= '*' and held ~= ARGV[1] then return false end
local position = ARGV[5] or redis.call('GETRANGE', KEYS[1], 88, 95)
local origin = ARGV[6] or redis.call('GETRANGE', KEYS[1], 16, 87)
redis.call('SET', KEYS[2], 'c' .. ARGV[2] .. position .. origin .. ARGV[4], 'PX', ARGV[3])
redis.call('DEL', KEYS[1])
return position
"""

_LOAD = """
return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}
"""

# ARGV: token
_TAKE = """
if redis.call('GETRANGE', KEYS[1], 0, 15) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1], KEYS[2]) and 1
"""

_EXPIRED, _CLOSED = b"e", b"c"
_TOKEN = 16


class _Script:
    """digest: what the server knows it by, once it has seen it."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.digest = hashlib.sha1(self.text).hexdigest().encode()


#: A script, and its keys and arguments: bytes, as everything else is turned into bytes with more effort.
_Call = tuple[_Script, tuple[bytes, ...]]


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """timeout: seconds for an answer. idle_timeout: of sessions, None: for ever. tombstone_life: seconds after that."""

    url: str
    timeout: float = 0.5
    idle_timeout: float | None = 900.0
    tombstone_life: float = 3600.0


class RedisStore:
    durability = "redis"

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._client: Any = _client(config)
        self._tokens = Tokens()
        self._queue: deque[tuple[list[_Call], asyncio.Future[list[Any]]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()
        self._answers = True  # so far as is known
        self._gone = b"%d" % _milliseconds(config.tombstone_life)
        self._write, self._end, self._load, self._take = map(_Script, (_with_lives(config), _END, _LOAD, _TAKE))

    def __repr__(self) -> str:
        return f"<RedisStore {len(self._under_way)} pipelines under way, {len(self._queue)} calls waiting>"

    async def start(self) -> None:
        """Say in the log if it cannot be reached; it may be later."""
        try:
            await self.load(("", ""))
        except StoreUnavailable as error:
            _log.error("the store does not answer", reason=error.message)

    async def stop(self) -> None:
        while self._under_way:
            await asyncio.wait(self._under_way)
        await self._client.aclose()

    async def commit(self, commits: Sequence[Commit]) -> list[UnrollError | None]:
        try:
            replies = await self._ask([self._call(commit) for commit in commits])
        except StoreUnavailable as error:
            return [error] * len(commits)
        return [_verdict(commit, reply) for commit, reply in zip(commits, replies, strict=True)]

    async def load(self, key: Key) -> Record | Gone | None:
        (reply,) = await self._ask([(self._load, _keys(key))])
        if isinstance(reply, RedisError):
            raise _unavailable(reply)
        state, gone = reply
        if state is not None:
            return Record.unpack(state[_TOKEN:], state[:_TOKEN])
        return None if gone is None else _read_gone(gone)

    async def close(self, key: Key) -> int | None:
        words = (*_keys(key), _ANY, self._tokens.next(), self._gone, pack_last(1, ()))
        (reply,) = await self._ask([(self._end, words)])
        if isinstance(reply, RedisError):
            raise _unavailable(reply)
        return None if reply is None else int.from_bytes(reply, "little")

    async def take(self, key: Key, token: bytes) -> bool:
        (reply,) = await self._ask([(self._take, (*_keys(key), token))])
        if isinstance(reply, RedisError):
            raise _unavailable(reply)
        return bool(reply)

    def _call(self, commit: Commit) -> _Call:
        who = (*_keys(commit.key), commit.expected, commit.token)
        if commit.ends:
            position = commit.position.to_bytes(8, "little")
            return self._end, (*who, self._gone, commit.last, position, commit.origin)
        record = pack(commit.origin, commit.position, commit.row, commit.last)
        return self._write, (*who, record, _will_expire(commit.origin)) if commit.begins else (*who, record)

    # ── pipelines ────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, calls: list[_Call]) -> list[Any]:
        """A reply or a RedisError for each. Raises StoreUnavailable if there are none."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._queue.append((calls, future))
        self._send()
        return await future

    def _send(self) -> None:
        while self._queue and len(self._under_way) < _PIPELINES:
            asked, self._queue = self._queue, deque()
            task = asyncio.create_task(self._pipeline(asked), name="store")
            self._under_way.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._send()

    async def _pipeline(self, asked: Sequence[tuple[list[_Call], asyncio.Future[list[Any]]]]) -> None:
        calls = [call for some, _ in asked for call in some]
        error: StoreUnavailable | None = None
        replies: list[Any] = []
        try:
            async with asyncio.timeout(self._config.timeout):
                replies = await self._execute(calls)
        except Exception as reason:  # whatever it is, nobody may wait for ever
            if not isinstance(reason, (RedisError, OSError, TimeoutError)):
                _log.error("an unforeseen error of the store", exc_info=reason)
            error = _unavailable(reason)
            # Whoever waits behind these would only learn the same, and later.
            asked, self._queue = [*asked, *self._queue], deque()
        if self._answers is not (error is None):
            self._answers = error is None
            (_log.info if error is None else _log.error)("the store", answers=self._answers, reason=str(error or ""))
        begin = 0
        for some, future in asked:
            end = begin + len(some)
            if future.done():  # whoever asked is gone
                pass
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(replies[begin:end])
            begin = end

    async def _execute(self, calls: Sequence[_Call]) -> list[Any]:
        replies = await self._run(calls, by_digest=True)
        if unknown := [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]:
            again = await self._run([calls[i] for i in unknown], by_digest=False)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies

    async def _run(self, calls: Sequence[_Call], *, by_digest: bool) -> list[Any]:
        """by_digest: the scripts are known to the server; otherwise they are sent, and known from then on."""
        pipeline = self._client.pipeline(**({} if isinstance(self._client, RedisCluster) else {"transaction": False}))
        for script, words in calls:
            if by_digest:
                pipeline.execute_command("EVALSHA", script.digest, b"2", *words)
            else:
                pipeline.execute_command("EVAL", script.text, b"2", *words)
        return await pipeline.execute(raise_on_error=False)


def _client(config: StoreConfig) -> Any:
    # One more try, at once, on a new connection: the old one may be dead for long. The scripts know what comes twice.
    retry = Retry(NoBackoff(), 1)
    options: dict[str, Any] = {"socket_connect_timeout": config.timeout, "socket_timeout": None, "retry": retry}
    if config.url.startswith(_CLUSTER):
        return RedisCluster.from_url("redis://" + config.url.removeprefix(_CLUSTER), **options)
    return Redis.from_url(config.url, **options)


def _keys(key: Key) -> tuple[bytes, bytes]:
    state = f"unroll:{{{key[0]}/{key[1]}}}".encode()
    return state, state + b":gone"


def _with_lives(config: StoreConfig) -> str:
    """The script that writes, with how long the keys live; without that, if sessions never expire."""
    if config.idle_timeout is None:
        return _WRITE % {"idle": "", "both": "", "longer": ""}
    idle, tombstone = _milliseconds(config.idle_timeout), _milliseconds(config.tombstone_life)
    both = idle + tombstone
    longer = _LONGER % (idle + tombstone // 2, both)
    return _WRITE % {"idle": f", 'PX', {idle}", "both": f", 'PX', {both}", "longer": longer}


def _will_expire(origin: bytes) -> bytes:
    return _EXPIRED + bytes(_TOKEN + 8) + origin


def _read_gone(content: bytes) -> Gone:
    begin = 1 + _TOKEN + 8
    origin, last = content[begin : begin + ORIGIN_BYTES], content[begin + ORIGIN_BYTES :]
    cause = SessionClosed if content[:1] == _CLOSED else SessionExpired
    return Gone(cause.code, Origin.from_bytes(origin), unpack_last(last)[0] if last else ())


def _verdict(commit: Commit, reply: Any) -> UnrollError | None:
    if isinstance(reply, RedisError):
        return _unavailable(reply)
    if reply is None or reply == 0:
        return SessionContended(f"session {commit.key[1]!r} was moved on by another replica", 0.1)
    return None


def _unavailable(reason: Exception) -> StoreUnavailable:
    why = str(reason).partition("\n")[0] or type(reason).__name__
    return StoreUnavailable(f"the store of sessions cannot be used now: {why}", _RETRY_AFTER)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
