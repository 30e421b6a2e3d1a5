"""One `unroll serve` as a child process, which keeps its port across kills and restarts."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from faults.preloaded import Served
from redis_server import free_port
from waiting import reached

ROOT = Path(__file__).parents[2]


def tiny_repository(folder: Path) -> Path:
    """Create a repository with the small LSTM of `unroll doctor`, which needs no export and loads quickly."""
    shutil.copytree(ROOT / "service" / "doctor" / "tiny", folder / "repository" / "tiny")
    return folder / "repository"


class Replica:
    """An `unroll serve` with more flags in `options` and more variables in `environment`."""

    def __init__(
        self, name: str, repository: Path, folder: Path, *options: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.port = free_port()
        self.log = folder / f"{name}.log"
        self.environment = dict(environment or {})
        where = ("--repository", str(repository), "--host", "127.0.0.1", "--port", str(self.port))
        self._flags = (*where, "--device", "cpu", "--log-level", "warning", *options)
        self._process: Served | subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start the process; returns immediately."""
        with self.log.open("ab") as log:
            environment = os.environ | self.environment
            if sys.platform == "linux":
                self._process = Served(self._flags, log.fileno(), environment)
            else:
                command = [sys.executable, "-m", "unroll", "serve", *self._flags]
                self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    async def ready(self) -> None:
        """Wait until the readiness probe returns 200."""

        async def is_ready_or_ended() -> bool:
            assert self.running, f"{self.name} ended: {self.log.read_text()[-2000:]}"
            return await is_ready(self.port)

        await reached(is_ready_or_ended, f"the readiness of {self.name}")

    async def start(self) -> None:
        self.launch()
        await self.ready()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL; nothing completes."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Suspend the process. The kernel still accepts connections and data, but nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def rescan(self) -> None:
        """Trigger a rescan for new and removed versions; returns immediately."""
        self._send(signal.SIGHUP)

    async def stopped(self) -> None:
        """Wait until the process is suspended, by the test or by itself."""
        assert self._process is not None
        await asyncio.to_thread(os.waitid, os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    async def terminate(self) -> int:
        """Send SIGTERM; returns the exit status."""
        self._send(signal.SIGTERM)
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait)

    async def ended(self) -> int:
        """Wait for the process to exit; returns the status."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.name} is not running"
        self._process.send_signal(number)


async def is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return (await asyncio.wait_for(reader.read(), 1.0)).startswith(b"HTTP/1.1 200")
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
