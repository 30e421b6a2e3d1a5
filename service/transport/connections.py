"""The open connections of a process: their limits, and the detection of silent clients.

Traffic on a connection costs nothing here. Every tenth of a second, a tenth of the connections are checked.
"""

import asyncio
import os
import resource
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fcntl import ioctl
from ipaddress import IPv6Address
from itertools import islice
from termios import TIOCOUTQ
from typing import Protocol, Self

from unroll.service.settings import Settings
from unroll.service.telemetry.metrics import OF_ADDRESS, OF_ALL, ConnectionFigures

#: Connections beyond the limit, which may only request the server's health.
PROBE_PLACES = 32
#: Descriptors reserved for files, models and the store.
_OTHER_FILES = 64
#: Maximum of `auto`.
_MOST = 65_536
_TICK_SECONDS = 0.1
_TICKS_PER_ROUND = 10
#: Connections to examine for an idle one when the limit is reached.
_ASKED = 32


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Attributes:
    connections: Maximum number; None: as many as there are descriptors for.
    per_address: Maximum per client address, or IPv6 /64 network; None for any number.
    head_timeout: Seconds for a TLS handshake, and for the head of a request.
    keep_alive: Seconds without a request after which a connection is closed.
    min_rate: Bytes per second at which a body or an answer must progress after its first `head_timeout`.
    header_bytes: Maximum total size of a request's header names and values.
    """

    connections: int | None
    per_address: int | None
    head_timeout: float
    keep_alive: float
    min_rate: int
    header_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        most = settings.max_connections
        return cls(
            None if most == "auto" else most,
            settings.max_connections_per_address,
            settings.head_timeout,
            settings.keep_alive,
            settings.min_rate,
            settings.max_header_bytes,
        )


class Connection(Protocol):
    def check(self, now: float) -> None:
        """Close it if it has been silent for too long."""

    def is_idle(self) -> bool:
        """Whether it can be closed without losing anything."""

    def close_for_another(self) -> None:
        """Close it to make room."""


class Connections:
    """All connections of a process. Streams are only counted; they check their clients themselves."""

    def __init__(self, limits: ConnectionLimits, figures: ConnectionFigures | None = None) -> None:
        """Raises ValueError if there are too few descriptors."""
        self._figures = figures or ConnectionFigures()
        affordable = _affordable()
        self._most = limits.connections or affordable
        if self._most > affordable:
            raise ValueError(
                f"--max-connections {self._most}: the limit of open files allows {affordable}; raise it (ulimit -n)"
            )
        self._most_of_one = limits.per_address
        self._watched: OrderedDict[Connection, str] = OrderedDict()
        self._figures.open = self
        self._probes: OrderedDict[Connection, str] = OrderedDict()
        self._streams = 0
        self._addresses: Counter[str] = Counter()
        self._round: Iterator[Connection] = iter(())
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched) + len(self._probes) + self._streams

    def enter(self, connection: Connection, address: str) -> str | None:
        """Add a connection. Returns the limit that it exceeds; such a connection may only request health."""
        address = _network(address)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._look)
        if (limit := self._exceeded(address)) is None:
            self._watched[connection] = address
            self._addresses[address] += 1
            return None
        if len(self._probes) >= PROBE_PLACES:
            self._probes.popitem(last=False)[0].close_for_another()
        self._probes[connection] = address
        return limit

    def count_refused(self, limit: str) -> None:
        self._figures.refused[limit] += 1

    def _exceeded(self, address: str) -> str | None:
        if self._most_of_one is not None and self._addresses[address] >= self._most_of_one:
            return OF_ADDRESS
        return None if len(self._watched) + self._streams < self._most or self._make_room() else OF_ALL

    def _make_room(self) -> bool:
        for connection in [*islice(self._watched, _ASKED)]:
            if connection.is_idle():
                self.leave(connection)
                connection.close_for_another()
                return True
            self._watched.move_to_end(connection)
        return False

    def leave(self, connection: Connection) -> None:
        if self._probes.pop(connection, None) is None and (address := self._watched.pop(connection, None)) is not None:
            self._forget(address)

    def becomes_stream(self, connection: Connection) -> Callable[[], None]:
        """Turn a connection into a stream. Returns a function to call at the stream's end."""
        address = self._watched.pop(connection)
        self._streams += 1

        def end() -> None:
            self._streams -= 1
            self._forget(address)

        return end

    def _forget(self, address: str) -> None:
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now, size = loop.time(), len(self._watched) // _TICKS_PER_ROUND + 1
        for _ in range(size):
            connection = next(self._round, None)
            if connection is None:
                self._round = iter([*self._watched, *self._probes])
                break
            if connection in self._watched or connection in self._probes:
                connection.check(now)
        self._timer = loop.call_later(_TICK_SECONDS, self._look) if self._watched or self._probes else None


class UnreadAnswer:
    """Tracks how fast a client takes the bytes written to it."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._size = self._taken = 0

    def check(self, now: float, size: int, limits: ConnectionLimits) -> bool:
        """False if the client takes bytes more slowly than the minimum rate."""
        if size == 0:
            self._since = None
        elif self._since is None:
            self._since, self._size, self._taken = now, size, 0
        else:
            self._taken += max(self._size - size, 0)
            self._size, seconds = size, now - self._since
            if seconds > limits.head_timeout:
                self._since = None
                return self._taken >= limits.min_rate * seconds
        return True


def unsent(transport: asyncio.Transport) -> int:
    """Bytes that the client has not taken, including the kernel's send buffer."""
    size = transport.get_write_buffer_size()
    if size and sys.platform == "linux":
        size += int.from_bytes(ioctl(transport.get_extra_info("socket"), TIOCOUTQ, bytes(4)), sys.byteorder)
    return size


def _network(address: str) -> str:
    """The address, or for IPv6 the /64 network, which usually belongs to one client."""
    if ":" not in address:
        return address
    parsed = IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed.packed[:8].hex())


def _affordable() -> int:
    """Connections for which the process has descriptors left."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST
    return max(min(limit - len(os.listdir("/dev/fd")) - _OTHER_FILES - PROBE_PLACES, _MOST), 1)
