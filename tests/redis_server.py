"""A private Redis-compatible server for a test, on a free loopback port and in its own folder.

It can be killed, suspended or starved of memory, and restarted on the same port from its files.
"""

import secrets
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from waiting import PATIENCE, until

from deploy import local_redis


def free_port() -> int:
    """Return a free loopback port below the ephemeral range, so that no connection takes it while Redis is down.

    A Redis Cluster also listens 10,000 ports above its own.
    """
    while True:
        port = 10_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class RedisServer:
    """A Redis with its files in `folder`. Skips the test if no server is installed.

    appendfsync: "always", "everysec" or "no". options: More flags by name.
    """

    def __init__(self, folder: Path, appendfsync: str = "everysec", **options: str) -> None:
        if why := local_redis.missing():
            pytest.skip(why)
        self._program = local_redis.server_path()
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._flags = {"appendonly": "yes", "appendfsync": appendfsync, "save": "", "loglevel": "warning", **options}
        self._process: subprocess.Popen[bytes] | None = None
        #: For inspection and fault injection; the servers under test have their own clients.
        self.client = redis.Redis(port=self.port, socket_timeout=PATIENCE)

    def start(self) -> None:
        """Start Redis with the data in its files, and wait until it replies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        where = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder)}
        flags = [word for name, value in {**where, **self._flags}.items() for word in (f"--{name}", value)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self._answers, "an answer of redis-server")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"redis-server ended: {(self.folder / 'log').read_text()[-2000:]}"
        try:
            return bool(self.client.ping())
        except (redis.ConnectionError, redis.BusyLoadingError):
            return False

    @property
    def append_only_files(self) -> Path:
        """The append-only folder; before Redis 7, a single file."""
        folder = self.folder / "appendonlydir"
        return folder if folder.exists() else self.folder / "appendonly.aof"

    def flush(self) -> None:
        self.client.flushall()

    def stop(self) -> None:
        """Shut Redis down cleanly, with all accepted data in its files."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Suspend the process: the kernel still accepts connections, but nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._send(number)
            self._send(signal.SIGCONT)
            self._process.wait(PATIENCE)
        self._process = None

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None, "redis-server is not running"
        self._process.send_signal(number)
