"""The contract of every store: a commit is applied once, and only on top of the commit it names."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from faults.proxy import Fault, FaultProxy
from memory_store import MemoryStore
from redis_server import RedisServer
from structlog.testing import capture_logs
from waiting import until

from unroll.service.core.errors import InvalidRequest, SessionContended, SnapshotInvalid, StoreUnavailable
from unroll.service.core.session_ids import owned
from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Commit, Key, Store, Tokens
from unroll.service.store.record import Gone, Kept, Origin, Record, pack, pack_last
from unroll.service.store.redis_store import RedisStore, RedisStoreConfig

KEY: Key = ("lstm", "a")
ORIGIN = Origin("ab" * 32, "stored", b"b" * 16, b"o" * 16)
KEPT = (Kept(0, 2, b"d" * 16, b"outputs"),)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis Cluster of one node. As any cluster, it refuses scripts with keys of different slots."""
    server = RedisServer(tmp_path_factory.mktemp("cluster"), **{"cluster-enabled": "yes"})
    server.start()
    server.client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
    until(lambda: b"cluster_state:ok" in server.client.execute_command("CLUSTER", "INFO", NEVER_DECODE=True))
    yield server
    server.kill()


@pytest.fixture(params=["memory", "embedded", "redis", "cluster"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        made: Store = MemoryStore()
    elif request.param == "embedded":
        made = EmbeddedStore(EmbeddedStoreConfig(tmp_path / "store", timeout=5.0))
    elif request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        made = RedisStore(RedisStoreConfig(server.url, timeout=5.0))
    else:
        server = request.getfixturevalue("cluster")
        server.flush()
        made = RedisStore(RedisStoreConfig(f"redis+cluster://127.0.0.1:{server.port}", timeout=5.0))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


def commit(
    token: bytes,
    expected: bytes = b"",
    position: int = 2,
    row: bytes | None = None,
    origin: bytes = ORIGIN.to_bytes(),
    **options: object,
) -> Commit:
    row, last = b"%d" % position * 8 if row is None else row, pack_last(1, KEPT)
    made = Commit(KEY, expected, token, pack(origin, position, row, last), begins=not expected)
    return replace(made, **options)


async def put(store: Store, *commits: Commit) -> list[type[Exception] | None]:
    return [error if error is None else type(error) for error in await store.commit(commits)]


async def test_session_is_loaded_as_committed(store: Store, tokens: Tokens):
    first, second = tokens.next(), tokens.next()
    assert await store.load(KEY) is None
    assert await put(store, commit(first)) == [None]
    assert await store.load(KEY) == Record(ORIGIN, 2, b"2" * 8, KEPT, 1, first)
    assert await put(store, commit(second, first, 3)) == [None]
    assert await store.load(KEY) == Record(ORIGIN, 3, b"3" * 8, KEPT, 1, second)


async def test_a_commit_that_follows_an_older_state_is_refused(store: Store, tokens: Tokens):
    first, second, third = (tokens.next() for _ in range(3))
    await put(store, commit(first), commit(second, first, 3))
    assert await put(store, commit(third, first, 3), commit(third, b"", 3)) == [SessionContended] * 2
    record = await store.load(KEY)
    assert isinstance(record, Record)
    assert record.token == second


async def test_refused_commit_returns_the_stored_record(store: Store, tokens: Tokens):
    first, second = tokens.next(), tokens.next()
    await put(store, commit(first), commit(second, first, 3))
    (refused,) = await store.commit([commit(tokens.next(), first, 4)])
    assert isinstance(refused, SessionContended)
    assert refused.record == Record(ORIGIN, 3, b"3" * 8, KEPT, 1, second)
    await store.close(KEY)
    for key in (KEY, ("lstm", "never")):
        (refused,) = await store.commit([replace(commit(tokens.next(), second, 4), key=key)])
        assert isinstance(refused, SessionContended)
        assert refused.record is None


async def test_a_newer_record_is_returned_at_once_or_not_at_all(store: Store, tokens: Tokens):
    first, second = tokens.next(), tokens.next()
    await put(store, commit(first), commit(second, first, 3))
    found = store.newer(KEY, first)
    assert found == (None if isinstance(store, RedisStore) else Record(ORIGIN, 3, b"3" * 8, KEPT, 1, second))
    assert store.newer(KEY, second) is None
    await store.close(KEY)
    assert store.newer(KEY, first) is None
    assert store.newer(("lstm", "never"), first) is None


async def test_many_are_looked_up_at_once_each_for_itself(store: Store, tokens: Tokens):
    keys = [("lstm", name) for name in "abc"]
    await put(store, *(replace(commit(tokens.next(), position=2 + n), key=key) for n, key in enumerate(keys)))
    await store.close(keys[1])
    found = await store.load_all([*keys, ("lstm", "never")])
    assert [each.position if isinstance(each, Record) else each for each in found] == [
        2,
        Gone("session_closed", ORIGIN),
        4,
        None,
    ]


async def test_the_same_commit_twice_counts_once(store: Store, tokens: Tokens):
    first, second = tokens.next(), tokens.next()
    assert await put(store, commit(first), commit(first), commit(second, first), commit(second, first)) == [None] * 4
    end = commit(tokens.next(), second, ends=True)
    assert await put(store, end, end) == [None, None]


async def test_ended_session_reports_its_cause_and_last_answer(store: Store, tokens: Tokens):
    first = tokens.next()
    await put(store, commit(first), commit(tokens.next(), first, ends=True))
    assert await store.load(KEY) == Gone("session_closed", ORIGIN, KEPT)
    assert await put(store, commit(tokens.next(), first)) == [SessionContended], "who missed the end cannot undo it"
    assert await put(store, commit(tokens.next())) == [None], "another may begin under the same id"


async def test_a_session_may_begin_and_end_in_one_commit(store: Store, tokens: Tokens):
    assert await put(store, commit(tokens.next(), ends=True)) == [None]
    assert isinstance(await store.load(KEY), Gone)


async def test_closing(store: Store, tokens: Tokens):
    assert await store.close(KEY) is None
    await put(store, commit(tokens.next()))
    assert await store.close(KEY, Origin("ab" * 32, "stored", b"c" * 16).to_bytes()) is None, "another session"
    assert await store.close(KEY, ORIGIN.to_bytes()) == 2
    assert await store.load(KEY) == Gone("session_closed", ORIGIN)
    assert await store.close(KEY) is None


async def test_new_session_replaces_the_one_it_names(store: Store, tokens: Tokens):
    first, second = tokens.next(), tokens.next()
    another = Origin("cd" * 32, "stored", b"c" * 16)
    await put(store, commit(first))
    assert await put(store, commit(second, first, 1, origin=another.to_bytes(), begins=True)) == [None]
    record = await store.load(KEY)
    assert isinstance(record, Record)
    assert record.origin == another


async def test_record_is_taken_only_once(store: Store, tokens: Tokens):
    first = tokens.next()
    await put(store, commit(first))
    assert not await store.take(KEY, tokens.next(), tokens.next())
    attempt = tokens.next()
    assert await store.take(KEY, first, attempt)
    assert await store.take(KEY, first, attempt), "the same call again"
    assert not await store.take(KEY, first, tokens.next())
    assert not await store.take(KEY, first)
    assert await store.load(KEY) is None


# ── Redis only ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def made(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(RedisStoreConfig(redis_server.url, timeout=2.0, idle_timeout=5.0, tombstone_life=7.0))
    yield store
    await store.stop()


def everything(server: RedisServer) -> set[str]:
    return {key.decode() for key in server.client.scan_iter()}


async def test_keys_and_their_lifetimes(made: RedisStore, redis_server: RedisServer, tokens: Tokens):
    state, gone = "unroll:{lstm/a}", "unroll:{lstm/a}:gone"
    await put(made, commit(tokens.next()))
    assert everything(redis_server) == {state, gone}
    assert 4000 < redis_server.client.pttl(state) <= 5000
    assert 11000 < redis_server.client.pttl(gone) <= 12000
    redis_server.client.delete(state)  # as after its expiry
    assert await made.load(KEY) == Gone("session_expired", ORIGIN)
    assert await made.close(KEY) is None


async def test_each_step_renews_the_sessions_lifetime(made: RedisStore, redis_server: RedisServer, tokens: Tokens):
    first = tokens.next()
    await put(made, commit(first))
    for key in everything(redis_server):
        redis_server.client.pexpire(key, 1000)
    await put(made, commit(tokens.next(), first))
    state, gone = "unroll:{lstm/a}", "unroll:{lstm/a}:gone"
    assert redis_server.client.pttl(state) > 4000
    assert redis_server.client.pttl(gone) > 11000, "what outlives the session by too little is made to live longer"


async def test_sessions_that_never_expire(redis_server: RedisServer, tokens: Tokens):
    store = RedisStore(RedisStoreConfig(redis_server.url, timeout=2.0, idle_timeout=None))
    first = tokens.next()
    await put(store, commit(first), commit(tokens.next(), first))
    assert {redis_server.client.pttl(key) for key in everything(redis_server)} == {-1}
    assert await store.close(KEY) == 2
    assert redis_server.client.pttl("unroll:{lstm/a}:gone") > 0
    await store.stop()


async def test_scripts_are_sent_again_when_the_server_forgot_them(
    made: RedisStore, redis_server: RedisServer, tokens: Tokens
):
    redis_server.client.script_flush()
    assert await put(made, commit(tokens.next()), commit(tokens.next(), key=("lstm", "b"))) == [None, None]


async def test_lost_connection_is_reopened(made: RedisStore, redis_server: RedisServer, tokens: Tokens):
    first = tokens.next()
    await put(made, commit(first))
    redis_server.client.client_kill_filter(_type="normal", skipme=True)
    assert await put(made, commit(tokens.next(), first)) == [None]


async def test_answers_received_in_time_but_read_late_are_not_timeouts(redis_server: RedisServer, tokens: Tokens):
    sent = asyncio.Event()

    def draw() -> Fault:
        sent.set()
        return Fault.NONE

    async with FaultProxy(redis_server.port) as proxy:
        store = RedisStore(RedisStoreConfig(f"redis://127.0.0.1:{proxy.port}/0", timeout=0.2))
        first = tokens.next()
        await put(store, commit(first))
        redis_server.pause()
        proxy.draw = draw
        putting = asyncio.create_task(put(store, commit(tokens.next(), first)))
        await sent.wait()
        redis_server.resume()
        time.sleep(0.5)  # noqa: ASYNC251 - as a process that gets no processor
        assert await putting == [None]
        await store.stop()


async def test_record_is_taken_once_if_the_answer_is_lost(redis_server: RedisServer, tokens: Tokens):
    """The connection breaks after Redis hands out the record; the repeated call gets it."""
    faults = iter([Fault.LOSE_REPLY])
    async with FaultProxy(redis_server.port) as proxy:
        store = RedisStore(RedisStoreConfig(f"redis://127.0.0.1:{proxy.port}/0", timeout=5.0))
        first = tokens.next()
        await put(store, commit(first))
        proxy.draw = lambda: next(faults, Fault.NONE)
        assert await store.take(KEY, first)
        assert next(faults, None) is None
        assert not await store.take(KEY, first)
        assert await store.load(KEY) is None
        assert await put(store, commit(tokens.next())) == [None]
        await store.stop()


async def test_a_close_that_is_sent_again_spares_the_session_opened_since(redis_server: RedisServer, tokens: Tokens):
    """Redis closes the session, the connection breaks, and another session gets the id before the retry."""
    calls, opened = (
        itertools.count(),
        tokens.next() + pack(Origin("ab" * 32, "stored", b"c" * 16).to_bytes(), 7, b"", b""),
    )

    def draw() -> Fault:
        if next(calls) == 0:
            return Fault.LOSE_REPLY
        redis_server.client.set("unroll:{lstm/a}", opened)
        redis_server.client.delete("unroll:{lstm/a}:gone")
        return Fault.NONE

    async with FaultProxy(redis_server.port) as proxy:
        store = RedisStore(RedisStoreConfig(f"redis://127.0.0.1:{proxy.port}/0", timeout=5.0))
        await put(store, commit(tokens.next()))
        proxy.draw = draw
        with pytest.raises(StoreUnavailable):
            await store.close(KEY, ORIGIN.to_bytes())
        assert redis_server.client.get("unroll:{lstm/a}") == opened
        await store.stop()


@pytest.mark.parametrize("ends", [False, True])
async def test_a_commit_that_is_refused_when_it_is_sent_again_may_have_been_stored(
    redis_server: RedisServer, tokens: Tokens, ends: bool
):
    """Redis runs the commit, the connection breaks, and another replica commits before the retry."""
    calls = itertools.count()

    def draw() -> Fault:
        if next(calls) == 0:
            return Fault.LOSE_REPLY
        redis_server.client.set("unroll:{lstm/a}", b"another replica.")
        redis_server.client.delete("unroll:{lstm/a}:gone")
        return Fault.NONE

    async with FaultProxy(redis_server.port) as proxy:
        store = RedisStore(RedisStoreConfig(f"redis://127.0.0.1:{proxy.port}/0", timeout=5.0))
        first = tokens.next()
        await put(store, commit(first))
        proxy.draw = draw
        assert await put(store, commit(tokens.next(), first, 3, ends=ends)) == [StoreUnavailable]
        assert await put(store, commit(tokens.next(), first, 3, ends=ends)) == [SessionContended]
        await store.stop()


async def test_each_of_many_is_answered_by_itself(store: Store, tokens: Tokens):
    """More commits than one script call takes; some are refused."""
    firsts = [commit(tokens.next(), key=("lstm", str(n))) for n in range(300)]
    assert await put(store, *firsts) == [None] * 300
    seconds = [
        replace(commit(tokens.next(), c.token if n % 3 else b"?" * 16, 3), key=c.key) for n, c in enumerate(firsts)
    ]
    assert await put(store, *seconds) == [None if n % 3 else SessionContended for n in range(300)]
    for n in (0, 1, 299):
        record = await store.load(("lstm", str(n)))
        assert isinstance(record, Record)
        assert record.position == (3 if n % 3 else 2)


async def test_fault_of_one_key_does_not_affect_other_keys(made: RedisStore, redis_server: RedisServer, tokens: Tokens):
    redis_server.client.lpush("unroll:{lstm/b}", "not a session")
    others = [commit(tokens.next(), key=("lstm", name)) for name in "abc"]
    assert await put(made, *others) == [None, StoreUnavailable, None]
    assert isinstance(await made.load(("lstm", "c")), Record)


async def test_store_out_of_memory_refuses_writes_and_keeps_its_records(
    made: RedisStore, redis_server: RedisServer, tokens: Tokens
):
    first = tokens.next()
    await put(made, commit(first))
    redis_server.client.config_set("maxmemory", 1)
    try:
        steps = commit(tokens.next(), first, 3), commit(tokens.next(), first, 3, ends=True)
        assert await put(made, *steps) == [StoreUnavailable] * 2
        record = await made.load(KEY)
        assert isinstance(record, Record)
        assert record.position == 2
        assert await made.close(KEY) == 2, "to close a session needs no memory"
        assert everything(redis_server) == set()
        assert await made.load(KEY) is None
    finally:
        redis_server.client.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:9/0", "redis+cluster://127.0.0.1:9", "redis+sentinel://127.0.0.1:9/main"]
)
async def test_absent_store_is_unavailable(url: str):
    store = RedisStore(RedisStoreConfig(url))
    with capture_logs() as logs:
        assert await put(store, commit(b"t")) == [StoreUnavailable]
        with pytest.raises(StoreUnavailable):
            await store.load(KEY)
    assert [(line["event"], line["answers"]) for line in logs] == [("store", False)]
    await store.stop()


# ── records as bytes ─────────────────────────────────────────────────────────────────────────────


def test_a_record_as_bytes():
    record = Record(ORIGIN, 2**40, b"row!" * 9, KEPT * 3, 5)
    content = record.to_bytes()
    assert Record.from_bytes(content) == record
    for i in range(len(content)):
        with pytest.raises(SnapshotInvalid):
            Record.from_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(SnapshotInvalid):
            Record.from_bytes(content[:i])


async def test_all_open_sessions_are_listed_page_by_page(store: Store, tokens: Tokens):
    keys = {("lstm", f"s{number} {{é}}:gone") for number in range(30)} | {("gru", "/")}
    assert await put(store, *[commit(tokens.next(), position=4, key=key) for key in keys]) == [None] * 31
    await put(store, commit(tokens.next(), key=("lstm", "ended")))
    await store.close(("lstm", "ended"))
    found, after = [], ""
    while True:
        page = await store.page(after, 7)
        assert len(page.sessions) <= 7
        found += page.sessions
        assert page.damaged == []
        if not (after := page.after):
            break
    assert sorted(session.key for session in found) == sorted(keys)
    assert {(one.digest, one.durability, one.position) for one in found} == {(ORIGIN.model, "stored", 4)}
    assert all(session.expires_in is None or 890 < session.expires_in <= 900 for session in found)
    assert all(session.bytes > 30 for session in found)


async def test_pages_of_a_tenant_reveal_no_other_tenant(store: Store, tokens: Tokens):
    tenants = ("a", "acme", "acme2", "z", "")
    keys = {t: {(m, owned(t, f"s{i}")) for m in ("gru", "gru-2", "lstm") for i in range(5)} for t in tenants}
    await put(store, *[commit(tokens.next(), key=key) for own in keys.values() for key in own])
    found, after = [], ""
    while True:
        page = await store.page(after, 2, "acme")
        found += page.sessions
        named = after = page.after
        with suppress(ValueError):  # hexadecimal in most stores
            named = bytes.fromhex(after.rpartition(".")[2]).decode()
        assert "\x1d" not in named or "\x1dacme\x1d" in named
        if not after:
            break
    assert sorted(session.key for session in found) == sorted(keys["acme"])


async def test_page_token_that_no_page_returned_is_refused(store: Store):
    if isinstance(store, MemoryStore):
        pytest.skip("any text names one of its pages")
    with pytest.raises(InvalidRequest, match="use `after` of the previous page"):
        await store.page("?", 1)


async def test_a_contended_session_is_named_as_its_client_knows_it(store: Store, tokens: Tokens):
    key = ("lstm", owned("acme", "mine"))
    await put(store, commit(tokens.next(), key=key))
    (error,) = await store.commit([commit(tokens.next(), expected=tokens.next(), key=key)])
    assert isinstance(error, SessionContended)
    assert "session 'mine' was updated" in error.message
