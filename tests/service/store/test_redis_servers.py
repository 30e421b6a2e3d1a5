"""Redis as in production: failover, Sentinels, and servers that refuse, evict, or are shared."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import redis
from faults.proxy import FaultProxy
from redis.exceptions import AuthenticationError, MovedError
from redis_server import RedisServer, free_port
from test_stores import KEY, commit, put
from waiting import PATIENCE, reached, until

from deploy import local_redis
from unroll.service.core.errors import StoreUnavailable
from unroll.service.store.interface import StoreRefused, Tokens
from unroll.service.store.record import Record
from unroll.service.store.redis_client import connect, disconnect, refusal
from unroll.service.store.redis_store import RedisStore, RedisStoreConfig

STATE = "unroll:{lstm/a}"


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis with password `right` for its users; the default user, used by the tests, has none."""
    server = RedisServer(tmp_path_factory.mktemp("guarded"))
    server.start()
    for name, rights in {"all": "~*", "reads": "~* -set", "others": "~other:*", "scripts": "~* -evalsha -eval"}.items():
        server.client.execute_command("ACL", "SETUSER", name, "on", ">right", "+@all", *rights.split())
    yield server
    server.kill()


# ── failover ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and its replica."""
    primary, replica = (RedisServer(tmp_path / name, **{"repl-diskless-sync-delay": "0"}) for name in ("one", "two"))
    for server in (primary, replica):
        server.start()
    replica.client.replicaof("127.0.0.1", primary.port)
    until(lambda: replica.client.info("replication")["master_link_status"] == "up", "a replica in sync")
    yield primary, replica
    for server in (primary, replica):
        server.kill()


@pytest.mark.parametrize(("answers", "error"), [("yes", "read only replica"), ("no", "Link with MASTER is down")])
async def test_a_demoted_primary_is_left_at_once_and_answers_no_lookup(
    pair: tuple[RedisServer, RedisServer], tokens: Tokens, answers: str, error: str
) -> None:
    primary, replica = pair
    first, second = tokens.next(), tokens.next()
    async with FaultProxy(primary.port) as proxy:
        store = RedisStore(RedisStoreConfig(f"redis://127.0.0.1:{proxy.port}/0", timeout=5.0))
        await put(store, commit(first))
        until(lambda: replica.client.exists(STATE), "the replicated session")
        replica.client.replicaof("NO", "ONE")
        primary.client.config_set("replica-serve-stale-data", answers)
        primary.client.replicaof("127.0.0.1", 9)
        proxy.target = replica.port  # for new connections
        assert await put(store, commit(second, first, 3)) == [None]
        record = await store.load(KEY)
        assert isinstance(record, Record)
        assert record.token == second
        proxy.target = primary.port
        proxy.cut()
        with pytest.raises(StoreUnavailable, match=error):
            await store.load(KEY)
        with pytest.raises(StoreUnavailable, match=error):
            await store.check()
        await store.stop()


@pytest.fixture
def sentinels(pair: tuple[RedisServer, RedisServer], tmp_path: Path) -> Iterator[list[int]]:
    """The ports of two Sentinels that know both servers of the pair; the service is `main`."""
    with ExitStack() as ending:
        ports = []
        for name in ("sentinel-1", "sentinel-2"):
            ports.append(free_port())
            settings = tmp_path / f"{name}.conf"
            lines = (
                *(f"port {ports[-1]}", "bind 127.0.0.1", f"dir {tmp_path}"),
                f"sentinel monitor main 127.0.0.1 {pair[0].port} 2",
                "sentinel down-after-milliseconds main 300",
                "sentinel failover-timeout main 5000",
            )
            settings.write_text("\n".join(lines) + "\n")
            command = [local_redis.server_path(), str(settings), "--sentinel"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            ending.callback(process.wait, PATIENCE)
            ending.callback(process.kill)
        clients = [ending.enter_context(redis.Redis(port=port)) for port in ports]
        until(lambda: all(map(knows_all, clients)), "Sentinels that know each other and the replica")
        yield ports


def knows_all(sentinel: redis.Redis) -> bool:
    try:
        main = sentinel.sentinel_masters()["main"]
    except redis.ConnectionError:
        return False
    return (main["num-slaves"], main["num-other-sentinels"]) == (1, 1)


async def test_sentinels_lead_to_the_new_primary(
    pair: tuple[RedisServer, RedisServer], sentinels: list[int], tokens: Tokens
) -> None:
    primary, replica = pair
    url = "redis+sentinel://" + ",".join(
        f"127.0.0.1:{port}" for port in (9, *sentinels)
    )  # nothing listens at the first
    other = RedisStore(RedisStoreConfig(f"{url}/other", timeout=5.0))
    with pytest.raises(StoreUnavailable, match="No master found for 'other'"):
        await other.check()
    await other.stop()
    store = RedisStore(RedisStoreConfig(f"{url}/main/0", timeout=5.0))
    await store.start()
    first, second = tokens.next(), tokens.next()
    assert await put(store, commit(first)) == [None]
    until(lambda: replica.client.exists(STATE), "the replicated session")
    primary.kill()

    async def is_committed() -> bool:
        (error,) = await put(store, commit(second, first, 3))
        assert error in (None, StoreUnavailable)
        return error is None

    await reached(is_committed, "a commit at the new primary")
    assert replica.client.get(STATE)[:16] == second
    await store.stop()


# ── startup ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["redis://all:right@{}/0", "valkey://{}/1"])
async def test_store_start_leaves_only_an_expiring_key(guarded: RedisServer, url: str) -> None:
    store = RedisStore(RedisStoreConfig(url.format(f"127.0.0.1:{guarded.port}"), timeout=5.0))
    await store.start()
    # Only the mark of a taken session remains, for minutes.
    assert all(0 < guarded.client.pttl(key) <= 600_000 for key in guarded.client.scan_iter())
    await store.stop()


async def test_a_server_that_has_no_password_yet_is_awaited() -> None:
    client = connect("redis://:later@localhost", 1.0)
    error = AuthenticationError("AUTH <password> called without any password configured for the default user.")
    assert refusal(client, error) is None
    await disconnect(client)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://all:wrong@{}/0", "invalid username-password pair.*check the user and the password"),
        ("redis://reads:right@{}/0", "needs EVALSHA"),
        ("redis://others:right@{}/0", "needs EVALSHA"),
        ("redis://scripts:right@{}/0", "needs EVALSHA"),
        ("redis://{}/99", "DB index is out of range; check the number"),
        ("redis+cluster://{}", "it is a single Redis: use redis://"),
    ],
)
async def test_a_server_that_can_never_be_used_is_refused(guarded: RedisServer, url: str, why: str) -> None:
    store = RedisStore(RedisStoreConfig(url.format(f"127.0.0.1:{guarded.port}"), timeout=5.0))
    with pytest.raises(StoreRefused, match=why):
        await store.start()
    await store.stop()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://localhost/0?timeout_of_sockets=1", "an option that does not exist: 'timeout_of_sockets'"),
        ("redis+cluster://localhost?timeout_of_sockets=1", "an option that does not exist: 'timeout_of_sockets'"),
        ("redis://localhost/0?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
        ("redis://localhost/first", "the number of a database"),
        ("redis+sentinel://localhost/main/first", "the number of a database"),
        ("rediss://localhost/0?ssl_ca_certs=/none", "ssl_ca_certs: there is no file '/none'"),
        ("redis+sentinel://localhost:26379", "host:port,host:port/SERVICE"),
        ("rediss+sentinel://localhost/main?ssl_ca_certs=/none", "ssl_ca_certs: there is no file '/none'"),
        ("redis+sentinel://localhost:26379,/main", "a Sentinel has no host"),
    ],
)
def test_a_url_that_is_wrong_is_refused(url: str, why: str) -> None:
    with pytest.raises(StoreRefused, match=why):
        RedisStore(RedisStoreConfig(url))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH")
    made, key = tmp_path / "certificate", tmp_path / "key"
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost")
    files = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made))
    command = ("openssl", "req", "-x509", "-nodes", "-days", "1", *kind, *files)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return made, key


def tls_files(certificate: tuple[Path, Path]) -> dict[str, str]:
    named, key = map(str, certificate)
    return {"tls-cert-file": named, "tls-key-file": key, "tls-ca-cert-file": named, "tls-auth-clients": "no"}


def has_started_or_ended(process: "subprocess.Popen[bytes]", log: Path) -> bool:
    return process.poll() is not None or (log.exists() and "Running mode" in log.read_text())


@pytest.fixture
def tls_sentinel(certificate: tuple[Path, Path], tmp_path: Path) -> Iterator[int]:
    """The port of a Sentinel of `main`. It and the primary require TLS."""
    ports = free_port(), free_port()
    with ExitStack() as ending:
        for name, port in zip(("primary", "sentinel"), ports, strict=True):
            (folder := tmp_path / name).mkdir()
            lines = {"port": "0", "tls-port": str(port), "tls-replication": "yes", "dir": str(folder)}
            lines |= {**tls_files(certificate), "logfile": str(folder / "log")}
            if name == "sentinel":
                lines["sentinel"] = f"monitor main 127.0.0.1 {ports[0]} 1"
            settings = folder / "redis.conf"
            settings.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
            words = ["--sentinel"] if name == "sentinel" else []
            process = subprocess.Popen([local_redis.server_path(), str(settings), *words], stdin=subprocess.DEVNULL)
            ending.callback(process.wait, PATIENCE)
            ending.callback(process.kill)
            until(partial(has_started_or_ended, process, folder / "log"), f"the {name}")
            if process.poll() is not None:
                pytest.skip("this Redis is built without TLS")
        yield ports[1]


async def test_sentinels_over_tls(tls_sentinel: int, certificate: tuple[Path, Path], tokens: Tokens) -> None:
    url = f"rediss+sentinel://127.0.0.1:{tls_sentinel}/main/0?ssl_ca_certs={certificate[0]}"
    store = RedisStore(RedisStoreConfig(url, timeout=5.0))
    await store.start()
    assert await put(store, commit(tokens.next())) == [None]
    await store.stop()


async def test_tls(certificate: tuple[Path, Path], tmp_path: Path, tokens: Tokens) -> None:
    """Covers a single server and a cluster; a certificate that cannot be verified is refused."""
    certificate_file = str(certificate[0])
    for url, cluster in (("valkeys://", "no"), ("rediss+cluster://", "yes")):
        tls_port = free_port()
        options = {
            "tls-port": str(tls_port),
            "cluster-enabled": cluster,
            "tls-cluster": cluster,
        }
        server = RedisServer(tmp_path / cluster, **tls_files(certificate), **options)
        try:
            server.start()
        except AssertionError as error:
            if "tls" in str(error).lower():
                pytest.skip("this Redis is built without TLS")
            raise
        if cluster == "yes":
            server.client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        address = f"{url}127.0.0.1:{tls_port}"
        stranger = RedisStore(RedisStoreConfig(address))
        with pytest.raises(StoreRefused, match=r"certificate verify failed.*ssl_ca_certs"):
            await stranger.start()
        await stranger.stop()
        store = RedisStore(RedisStoreConfig(f"{address}?ssl_ca_certs={certificate_file}", timeout=5.0))
        await store.start()
        assert await put(store, commit(tokens.next())) == [None]
        await store.stop()
        server.kill()


async def test_a_cluster_that_is_taken_for_a_single_server_is_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, **{"cluster-enabled": "yes"})
    server.start()
    server.client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
    store = RedisStore(RedisStoreConfig(server.url, timeout=5.0))
    with pytest.raises(StoreRefused, match=r"use redis\+cluster://"):
        await store.start()
    await store.stop()
    server.kill()


async def test_a_cluster_that_moves_its_slots_is_awaited() -> None:
    for scheme, ends in (("redis", True), ("redis+cluster", False)):
        client = connect(f"{scheme}://localhost", 1.0)
        assert bool(refusal(client, MovedError("1 127.0.0.1:6379"))) is ends
        await disconnect(client)


# ── sharing and eviction ─────────────────────────────────────────────────────────────────────────


async def test_deployments_with_different_prefixes_are_isolated(redis_server: RedisServer, tokens: Tokens) -> None:
    stores = [RedisStore(RedisStoreConfig(redis_server.url, timeout=5.0, prefix=name)) for name in ("unroll", "b:2")]
    firsts = [tokens.next(), tokens.next()]
    for store, first in zip(stores, firsts, strict=True):
        assert await store.load(KEY) is None
        assert await put(store, commit(first)) == [None]
    assert await stores[0].close(KEY) == 2
    record = await stores[1].load(KEY)
    assert isinstance(record, Record)
    assert record.token == firsts[1]
    kept = {b"unroll:{lstm/a}:gone", b"b:2:{lstm/a}", b"b:2:{lstm/a}:gone"}
    assert {*redis_server.client.scan_iter()} == kept
    for store in stores:
        await store.stop()


async def test_absent_session_is_not_reported_as_expired_on_an_evicting_server(
    redis_server: RedisServer, tokens: Tokens
) -> None:
    redis_server.client.config_set("maxmemory-policy", "allkeys-lru")
    redis_server.client.config_set("maxmemory", "1gb")
    store = RedisStore(RedisStoreConfig(redis_server.url, timeout=5.0))
    try:
        await store.start()
        assert store.figures.evicts
        await put(store, commit(tokens.next()))
        redis_server.client.delete(STATE)  # as if evicted
        assert await store.load(KEY) is None
    finally:
        redis_server.client.config_set("maxmemory-policy", "noeviction")
        redis_server.client.config_set("maxmemory", "0")
    await store._look_for_eviction()
    assert not store.figures.evicts
    await store.stop()
