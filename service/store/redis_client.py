"""Creates a Redis client from a URL: for one server, the primary of Sentinels, or a cluster.

Also interprets errors at the start, and reads the eviction policy.
"""

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import hiredis
from redis.asyncio import Connection, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterCrossSlotError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from unroll.service.core.choices import SCHEMES
from unroll.service.store.interface import StoreRefused

#: Exceptions of redis-py if there is no reply.
FAILURES = (RedisError, RedisClusterException, OSError)
#: Exceptions after which a new connection may help: this one is dead, or its server is no longer the primary.
LOST = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, MasterDownError)
_SENTINEL_PORT = 26379
#: Options that name files.
_FILES = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})

#: Error of a Redis that has no password yet but is about to get one, as during an upgrade of the Helm chart.
_NO_PASSWORD_YET = "called without any password"  # noqa: S105 words of an error
_RIGHTS = "its user needs EVALSHA, EVAL, SET, GET, GETRANGE, DEL, PTTL and PEXPIRE on the keys of --store-prefix"
#: Errors that do not go away by waiting, with remedies. By class, or by words in the message.
_REFUSALS: tuple[tuple[type[Exception] | str, str], ...] = (
    (AuthenticationError, "check the user and the password in --store"),
    (AuthorizationError, _RIGHTS),
    (NoPermissionError, _RIGHTS),
    ("user executing the script can't", _RIGHTS),
    ("ACL failure in script", _RIGHTS),
    (ssl.SSLCertVerificationError, "specify its CA file: rediss://…?ssl_ca_certs=FILE"),
    ("DB index is out of range", "check the number of the database at the end of --store"),
    ("Cluster mode is not enabled", "it is a single Redis: use redis://"),
    (MovedError, "it is a Redis Cluster: use redis+cluster://"),
    (ClusterCrossSlotError, "it is a Redis Cluster: use redis+cluster://"),
)


class _Packing:
    """Packs commands with hiredis in a third of the time. Not used for TLS and Unix sockets."""

    _packer = HiredisRespSerializer()

    def pack_command(self, *args: Any) -> list[bytes]:
        if args[0] == "EVALSHA":  # whose many words need no conversion
            return [hiredis.pack_command(args)]
        return self._packer.pack(*args)


class _Connection(_Packing, Connection):
    pass


class _SentinelConnection(_Packing, SentinelManagedConnection):
    pass


def connect(url: str, timeout: float) -> Any:
    """Create a client, which connects on first use and never retries.

    Args:
        url: See `SCHEMES`. For Sentinels: `redis+sentinel://[user:password@]host:port,host:port/service[/db]`, or
            `rediss+sentinel://...` for TLS to the Sentinels and to the servers that they name.
        timeout: Seconds for a new connection.

    Raises:
        StoreRefused: The URL is invalid.
    """
    retry = Retry(NoBackoff(), 0, LOST)  # disconnects after these errors
    options: dict[str, Any] = {"socket_connect_timeout": timeout, "socket_timeout": None, "retry": retry}
    scheme, _, rest = url.partition("://")
    try:
        _check_files(url)
        if scheme.endswith("+sentinel"):
            client = _at_sentinels(SCHEMES[scheme], rest, timeout, options)
        elif scheme.endswith("+cluster"):
            return RedisCluster.from_url(f"{SCHEMES[scheme]}://{rest}", **options)
        else:
            _check_database(url, scheme)
            client = Redis.from_url(f"{SCHEMES[scheme]}://{rest}", connection_class=_Connection, **options)
        client.connection_pool.make_connection()  # does not connect yet; refuses unknown options
    except TypeError as error:
        option = str(error).rpartition("argument ")[2]
        raise StoreRefused(f"--store has an option that does not exist: {option}") from error
    except ValueError as error:
        raise StoreRefused(f"--store is invalid: {error}") from error
    return client


async def disconnect(client: Any) -> None:
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


async def eviction_policy(client: Any) -> str | None:
    """The policy by which the server evicts keys when its memory is full; None for none. Raises one of FAILURES."""
    if isinstance(client, RedisCluster):
        answers = [await client.info("memory", target_nodes=node) for node in client.get_primaries()]
    else:
        answers = [await client.info("memory")]
    policies = [str(info.get("maxmemory_policy", "noeviction")) for info in answers if info.get("maxmemory")]
    return next((policy for policy in policies if policy != "noeviction"), None)


def refusal(client: Any, reason: BaseException) -> str | None:
    """The remedy for an error that does not go away by waiting; None if the store may answer later."""
    if isinstance(client, RedisCluster) and isinstance(reason, MovedError):
        return None  # the cluster is moving slots
    for error in _causes(reason):
        if _NO_PASSWORD_YET in str(error):
            return None
        for kind, remedy in _REFUSALS:
            if kind in str(error) if isinstance(kind, str) else isinstance(error, kind):
                return f"{str(error).rstrip('.')}; {remedy}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_files(url: str) -> None:
    for name, (path, *_) in parse_qs(urlsplit(url).query).items():
        if name in _FILES and not Path(path).is_file():
            raise ValueError(f"{name}: there is no file {path!r}")


def _check_database(url: str, scheme: str) -> None:
    database = urlsplit(url).path.strip("/")
    if scheme != "unix" and database and not database.isdecimal():
        raise ValueError("the path is the number of a database; write / in a password as %2F")


def _at_sentinels(scheme: str, rest: str, timeout: float, options: dict[str, Any]) -> Redis:
    """A client for the primary that the Sentinels name. They are queried for each new connection."""
    authority, _, path = rest.partition("?")[0].partition("/")
    user, at, hosts = authority.rpartition("@")
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise ValueError(f"write {scheme}+sentinel://host:port,host:port/SERVICE")
    sentinels = [_address(host) for host in hosts.split(",")]
    redis_url = f"{scheme}://{user}{at}host/{database}?{rest.partition('?')[2]}"
    _check_database(redis_url, scheme)
    own: dict[str, Any] = dict(parse_url(redis_url))
    del own["host"]
    over_tls = own.pop("connection_class", None) is not None
    # Each gets a share of the time, so that the last is queried even if the rest do not answer.
    share = timeout / (len(sentinels) + 1)
    asking = {"socket_connect_timeout": share, "socket_timeout": share, "retry": Retry(NoBackoff(), 0), "ssl": over_tls}
    asking |= {name: value for name, value in own.items() if name.startswith("ssl_")}
    for name in ("username", "password"):
        if (value := own.pop(f"sentinel_{name}", None)) is not None:
            asking[name] = value
    manager = Sentinel(sentinels, sentinel_kwargs=asking)
    kind = SentinelManagedSSLConnection if over_tls else _SentinelConnection
    return manager.master_for(service, connection_class=kind, **options, **own)


def _address(host: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError("a Sentinel has no host")
    return parts.hostname, parts.port or _SENTINEL_PORT
