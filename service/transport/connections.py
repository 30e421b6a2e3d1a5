"""The open connections of a process: how many there may be, who gets the last of them, and which are silent too long.

A connection costs nothing here between its begin and its end, whatever it carries: a tenth of them are looked at in
every tenth of a second.
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

#: Connections beyond the limit that may ask for the server's health.
PROBE_PLACES = 32
#: Descriptors that files, models and the store may still need.
_OTHER_FILES = 64
#: What `auto` means where files are not limited, or hardly.
_MOST = 65_536
_TICK_SECONDS = 0.1
_TICKS_PER_ROUND = 10
#: Connections that are asked whether they are idle when one more arrives than there may be.
_ASKED = 32


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Attributes:
    connections: At a time; None: as many as there are descriptors for.
    per_address: Of one client address, or network /64; None for any number.
    head_timeout: Seconds for a TLS handshake, and for the head of a request.
    keep_alive: Seconds without a request after which a connection is closed.
    min_rate: Bytes a second that a body, or an answer, must move at after its first `head_timeout`.
    header_bytes: Of a request: all names and values.
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
        """Nothing is lost if it is closed."""

    def close_for_another(self) -> None:
        """Make room."""


class Connections:
    """All connections of a process, streams included; a stream looks after itself, and is only counted."""

    def __init__(self, limits: ConnectionLimits, figures: ConnectionFigures | None = None) -> None:
        """Raises ValueError if there are not enough descriptors."""
        self._figures = figures or ConnectionFigures()
        self._figures.open = self
        affordable = _affordable()
        self._most = limits.connections or affordable
        if self._most > affordable:
            raise ValueError(
                f"--max-connections {self._most}: the limit of open files allows {affordable}; raise it (ulimit -n)"
            )
        self._most_of_one = limits.per_address
        self._watched: OrderedDict[Connection, str] = OrderedDict()
        self._probes: OrderedDict[Connection, str] = OrderedDict()
        self._streams = 0
        self._addresses: Counter[str] = Counter()
        self._round: Iterator[Connection] = iter(())
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched) + len(self._probes) + self._streams

    def enter(self, connection: Connection, address: str) -> str | None:
        """A new connection. Returns the limit that it is beyond: it may only ask for the server's health."""
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
        """Close one of the idle connections that are here for longest."""
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
        """Returns what is to be called at the end of the stream."""
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
        """Check the next ones."""
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
    """Bytes that were written and that the client has not taken."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._size = self._taken = 0

    def check(self, now: float, size: int, limits: ConnectionLimits) -> bool:
        """False: the client takes fewer bytes a second than it must."""
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
    """Bytes that the client has not taken. The system takes more of us only once a third of its own buffer is free."""
    size = transport.get_write_buffer_size()
    if size and sys.platform == "linux":
        size += int.from_bytes(ioctl(transport.get_extra_info("socket"), TIOCOUTQ, bytes(4)), sys.byteorder)
    return size


def _network(address: str) -> str:
    """Of IPv6, what one client may have all addresses of."""
    if ":" not in address:
        return address
    parsed = IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed.packed[:8].hex())


def _affordable() -> int:
    """Connections that the process has descriptors for, besides what it has open and will open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST
    return max(min(limit - len(os.listdir("/dev/fd")) - _OTHER_FILES - PROBE_PLACES, _MOST), 1)
