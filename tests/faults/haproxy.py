"""A real HAProxy with the deployed configuration, in front of replicas on the loopback."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from faults.replica import ROOT, is_ready
from redis_server import free_port
from waiting import PATIENCE, reached


def missing() -> str:
    """Return why HAProxy cannot run here, or an empty string if it can."""
    return "" if shutil.which("haproxy") else "haproxy is not installed"


class HAProxy:
    """HAProxy in front of the replicas on `ports`, which replace DNS. Frequent health checks save time."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.port = free_port()
        self._config, self._log = folder / "haproxy.cfg", folder / "haproxy.log"
        replicas = "\n".join(f"  server replica-{port} 127.0.0.1:{port} check inter 250ms" for port in ports)
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        text, binds = re.subn(r"bind :8000", f"bind 127.0.0.1:{self.port}", text)
        text, templates = re.subn(r"  server-template .*", replicas, text)
        assert (binds, templates) == (1, 1), "deploy/haproxy.cfg has changed"
        self._config.write_text(text)
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start HAProxy and wait until a replica replies through it."""
        process = self._process = self._launch()

        async def answers_or_ended() -> bool:
            assert process.poll() is None, self._log.read_text()
            return await is_ready(self.port)

        await reached(answers_or_ended, "an answer through HAProxy")

    def _launch(self) -> "subprocess.Popen[bytes]":
        command = ["haproxy", "-db", "-f", str(self._config)]
        with self._log.open("wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)
            self._process = None
