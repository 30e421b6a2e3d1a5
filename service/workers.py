"""`unroll serve --workers N`: N worker processes behind one port, and a supervisor that keeps them alive.

The supervisor binds one listening socket per worker to the same port, over which the kernel distributes connections
evenly. It keeps the sockets open, so that a dead worker's replacement accepts the waiting connections. The supervisor
itself never accepts connections and loads no models. Over a socket pair, a worker reports that it is serving, and
detects the end of the supervisor. In a private folder, each worker listens for requests from the others.
"""

import asyncio
import os
import secrets
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Self

import structlog

from unroll.service.api.all_workers import AllWorkers

_log = structlog.get_logger(__name__)

#: Environment variable of a worker: number from 1, descriptors of the sockets, secret of tickets, folder.
_VARIABLE = "UNROLL_WORKER"
_BACKLOG = 2048
#: Delays before a restart in seconds. There is none if the worker served for long. The first applies if it served or
#: was killed, the rest after repeated failures to start.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
_LONG = 10.0
#: Signals that a crash raises. Any other comes from outside, for example SIGKILL when memory runs out.
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS}


@dataclass(frozen=True, slots=True)
class Worker:
    """State that a worker inherits from its supervisor.

    Attributes:
        operator: The listening socket of the operator's port, shared by all workers, if there is one.
        ticket_secret: Shared by all workers, so that they accept each other's tickets.
        folder: The folder of the workers' sockets for requests from each other.
    """

    number: int
    listener: socket.socket
    link: socket.socket
    operator: list[socket.socket]
    ticket_secret: bytes
    folder: Path

    @classmethod
    def inherited(cls) -> Self | None:
        """The state of this process if it is a worker, else None."""
        text = os.environ.pop(_VARIABLE, None)
        if text is None:
            return None
        number, descriptors, secret, folder = text.split(maxsplit=3)
        listener, link, *operator = [socket.socket(fileno=int(one)) for one in descriptors.split(",")]
        return cls(int(number), listener, link, operator, bytes.fromhex(secret), Path(folder))

    def all(self, count: int) -> AllWorkers:
        ports = {listener.getsockname()[1] for listener in (self.listener, *self.operator)}
        return AllWorkers([self._socket(number) for number in range(1, count + 1)], ports)

    def _socket(self, number: int) -> Path:
        return self.folder / str(number)

    def operator_listeners(self) -> list[socket.socket]:
        """The operator's port, if there is one, and the socket for other workers' requests. Raises OSError."""
        path = self._socket(self.number)
        path.unlink(missing_ok=True)  # the previous process's
        own = socket.socket(socket.AF_UNIX)
        own.bind(str(path))
        return [*self.operator, own]

    def listeners(self, host: str, first_own_port: int | None) -> list[socket.socket]:
        """The worker's listening sockets: the shared port, and with `first_own_port` its own. Raises OSError."""
        own = [] if first_own_port is None else [bind(host, first_own_port + self.number - 1)]
        return [self.listener, *own]

    def serving(self, orphaned: Callable[[], object]) -> None:
        """Report to the supervisor, and call `orphaned` when that ends. Requires a running event loop."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(self.link)
            rmtree(self.folder, ignore_errors=True)  # the supervisor could not
            orphaned()

        self.link.send(b"1")
        loop.add_reader(self.link, gone)


@dataclass(frozen=True, slots=True)
class _End:
    """How one process of a worker ended.

    Attributes:
        status: Its exit status, or the negated signal number.
        served: Seconds for which it served; None if it never did.
    """

    status: int
    served: float | None = None

    @property
    def by_others(self) -> bool:
        """Whether it was killed from outside. On SIGTERM before it serves, a worker exits with status 0."""
        return (self.status == 0 and self.served is None) or (self.status < 0 and -self.status not in _CRASHES)

    def __str__(self) -> str:
        if self.status >= 0:
            return f"it exited with status {self.status}"
        cause = "by hand, or because memory ran out: see dmesg" if self.status == -signal.SIGKILL else ""
        return f"it was killed by signal {-self.status}, {cause or signal.strsignal(-self.status)}"


def supervise(
    host: str, port: int, workers: int, scheme: str = "http", operator: tuple[str, int | None] = ("", None)
) -> int:
    """Run until a signal, or until a worker cannot start. Returns the exit status.

    operator: Host and number of the operator's port; the number is None without one.
    """
    try:
        with bind(host, port) as probe:  # without SO_REUSEPORT, detects another server on the port
            port = probe.getsockname()[1]
        listeners = [bind(host, port, shared=True) for _ in range(workers)]
        operator_listeners = bind_for_operator(*operator)
        folder = TemporaryDirectory(prefix="unroll-")
    except OSError as error:
        _log.error("not started", reason=str(error))
        return 1
    with folder:
        supervisor = _Supervisor(host, port, listeners, scheme, operator_listeners, folder.name)
        return asyncio.run(supervisor.run())


class _Supervisor:
    def __init__(
        self,
        host: str,
        port: int,
        listeners: list[socket.socket],
        scheme: str,
        operator: list[socket.socket],
        folder: str,
    ) -> None:
        self._host, self._port, self._scheme = host, port, scheme
        self._listeners = listeners
        self._operator = operator
        self._folder = folder
        self._ticket_secret = secrets.token_hex(32)
        self._running: set[Process] = set()
        self._serving: set[Process] = set()
        self._served: set[int] = set()  # workers that have served at least once
        self._rescans = 0
        self._one_at_a_time = asyncio.Lock()  # a starting worker measures call costs and allocates memory
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._rescan)
        await asyncio.gather(*[self._keep(index) for index in range(len(self._listeners))])
        return self._status

    def _stop(self) -> None:
        """Stop the workers. After a second call, they do not wait for their clients."""
        self._stopping.set()
        for listener in (*self._listeners, *self._operator):
            listener.close()
        for process in self._running:
            _send(process, signal.SIGTERM)

    def _rescan(self) -> None:
        """Forward SIGHUP. Starting workers get it once they serve."""
        self._rescans += 1
        for process in self._serving:
            _send(process, signal.SIGHUP)

    async def _keep(self, index: int) -> None:
        """Keep one worker running until the stop. If it never starts serving, stop all, unless it was killed."""
        failures = 0
        while not self._stopping.is_set():
            end = await self._run_one(index)
            if self._stopping.is_set():
                if end.status not in (0, -signal.SIGTERM):
                    self._status = 1
                    _log.error("worker exited", worker=index + 1, status=end.status, reason=str(end))
                return
            if index not in self._served and not end.by_others:
                self._give_up(index, end)
                return
            failures = 0 if end.served is not None or end.by_others else failures + 1
            pause = 0.0 if (end.served or 0.0) > _LONG else _PAUSES[min(failures, len(_PAUSES) - 1)]
            _log.error("worker exited", worker=index + 1, status=end.status, reason=str(end), restarts_in=pause)
            if pause:
                await self._pause(index, pause)

    def _give_up(self, index: int, end: _End) -> None:
        remedy = "fix the problem in its last log line" if end.status > 0 else "run `unroll doctor`"
        reason = f"worker {index + 1} did not start serving, so all workers stop: {end}; {remedy}, and start again"
        _log.error("not started", worker=index + 1, status=end.status, reason=reason)
        self._status = 1
        self._stop()

    async def _run_one(self, index: int) -> _End:
        loop, since = asyncio.get_running_loop(), None
        try:
            async with self._one_at_a_time:
                if self._stopping.is_set():
                    return _End(0)
                if self._listeners[index].fileno() < 0:
                    self._listeners[index] = bind(self._host, self._port, shared=True)
                rescans = self._rescans
                process, link = await self._start(index)
                if await loop.sock_recv(link, 1):
                    since = loop.time()
                    self._serving.add(process)
                    self._announce(index)
                    if rescans < self._rescans:
                        _send(process, signal.SIGHUP)
        except OSError as error:  # out of memory, processes, descriptors or ports
            _log.error("worker not started", worker=index + 1, reason=str(error))
            return _End(1)
        with link:
            status = await process.wait()
        self._running.discard(process)
        self._serving.discard(process)
        return _End(status, None if since is None else loop.time() - since)

    async def _start(self, index: int) -> tuple[Process, socket.socket]:
        """Start a worker process. Returns it and the supervisor's end of the link."""
        listener = self._listeners[index]
        ours, theirs = socket.socketpair()
        descriptors = [inherited.fileno() for inherited in (listener, theirs, *self._operator)]
        value = f"{index + 1} {','.join(map(str, descriptors))} {self._ticket_secret} {self._folder}"
        with theirs, ExitStack() as on_error:
            on_error.enter_context(ours)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *sys.orig_argv[1:]),
                env={**os.environ, _VARIABLE: value},
                pass_fds=descriptors,
                process_group=0,  # Ctrl-C reaches only the supervisor, which forwards it
            )
            on_error.pop_all()
        ours.setblocking(False)
        self._running.add(process)
        if self._stopping.is_set():
            _send(process, signal.SIGTERM)
        return process, ours

    def _announce(self, index: int) -> None:
        if index not in self._served:
            self._served.add(index)
            if len(self._served) == len(self._listeners):
                host = f"[{self._host}]" if ":" in self._host else self._host
                _log.info(f"running on {self._scheme}://{host}:{self._port}", workers=len(self._listeners))

    async def _pause(self, index: int, seconds: float) -> None:
        """Wait before a restart. Other workers get all new connections; those waiting for this one are refused."""
        self._listeners[index].close()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _send(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the process has just exited
        process.send_signal(number)


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Create a listening socket. shared: set SO_REUSEPORT. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)


def bind_for_operator(host: str, port: int | None) -> list[socket.socket]:
    """Listen on the operator's port, if there is one. Raises OSError."""
    if port is None:
        return []
    listener = bind(host, port)
    _log.info("operator's port", host=host, port=listener.getsockname()[1])
    return [listener]
