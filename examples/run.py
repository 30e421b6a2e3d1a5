"""`make run` and `make stop`: serve the example bundles, run the demo, and keep serving.

python -m unroll.examples.run [--port 8000] [--detach]      start, run the demo, serve until Ctrl-C or detach
python -m unroll.examples.run --stop                        stop the server that `--detach` left running

Sessions are stored in `.run/sessions` and survive the server: the demo kills it halfway.
"""

import argparse
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from unroll.examples import demo

REPOSITORY = Path(__file__).parent / "repository"
#: The working folder, in the current directory.
RUN = Path(".run")
#: Holds the server's process id. The server locks the file while it runs, because process ids are reused.
PID_FILE = RUN / "server.pid"
LOG = RUN / "server.log"
STORE = RUN / "sessions"

_HOST = "127.0.0.1"
_READY_SECONDS = 60.0
_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.1


class NotStarted(Exception):
    """The server did not start; the message has the reason and a remedy."""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    RUN.mkdir(exist_ok=True)
    if options.stop:
        return stop()
    server = Server(options.repository, options.port, options.store)
    try:
        server.start()
        status = demo.run(server.url, server=server)
        print(f"\nOpen {server.url} in a browser to try the models; {server.url}/docs is the API. Log: {LOG}.")
        if options.detach:
            print(f"Process {server.pid}; `make stop` stops it.")
            return status
        print("Ctrl-C stops it.", flush=True)
        ended = server.wait()
        print(f"the server exited with status {ended}; see {LOG}", file=sys.stderr)
        return ended or status
    except NotStarted as error:
        print(f"make run: {error}", file=sys.stderr)
        server.end()
        return 1
    except KeyboardInterrupt:
        print("\nstopping ...")
        return server.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unroll.examples.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR")
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="folder of the sessions")
    parser.add_argument("--detach", action="store_true", help="return after the demo and leave the server running")
    parser.add_argument("--stop", action="store_true", help="stop the server that --detach left running")
    return parser


class Server:
    """`unroll serve` as a child process that can be killed and restarted; its sessions are in `store`."""

    def __init__(self, repository: Path, port: int, store: Path) -> None:
        self.url = f"http://{_HOST}:{port}"
        self._port = port
        flags = ("--repository", str(repository), "--port", str(port), "--store", store.resolve().as_uri())
        self._command = (sys.executable, "-m", "unroll", "serve", *flags)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a process, and wait until it is ready. Raises NotStarted."""
        with PID_FILE.open("a+") as file:
            if not _lock(file):
                running = f"a server from this folder is already running (process {_pid()})"
                raise NotStarted(f"{running}; `make stop` stops it")
            if not _is_free(self._port):
                other = f"choose another: make run PORT={self._port + 1}"
                raise NotStarted(f"port {self._port} is in use by another program; {other}")
            with LOG.open("ab" if self._process else "wb") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server
                    pass_fds=[file.fileno()],  # the lock lasts as long as the server
                )
            file.truncate(0)
            file.write(f"{self._process.pid}\n")
        _wait_until_ready(self._process, self.url)

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def wait(self) -> int:
        """Wait for the process. Returns its exit status."""
        return self._process.wait() if self._process else 0

    def kill(self) -> None:
        """Kill the process, to simulate a crash."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def end(self) -> int:
        """Send SIGTERM, or SIGKILL if it does not exit in time. Returns the exit status."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while server.poll() is None:
        try:
            with urlopen(f"{url}/readyz", timeout=1):  # noqa: S310 of this machine
                return
        except (URLError, OSError):
            if time.monotonic() > deadline:
                raise NotStarted(f"not ready after {_READY_SECONDS:.0f} s; see {LOG}") from None
            time.sleep(_POLL_SECONDS)
    lines = LOG.read_text(errors="replace").splitlines()[-10:]
    if lines and (refused := re.search(r'"reason": "(the store [^"]+)"', lines[-1])):
        raise NotStarted(f"{refused[1]}\nChoose another folder, on a disk of this machine: make run STORE=/tmp/unroll")
    raise NotStarted("\n".join([f"the server exited with status {server.returncode}; the end of {LOG}:", *lines]))


def stop() -> int:
    """Send SIGTERM to the server that holds the lock, and wait until it releases it."""
    with PID_FILE.open("a+") as file:
        if _lock(file):
            print("no server from this folder is running")
            return 0
        pid = _pid()
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while not _lock(file):
            if time.monotonic() > deadline:
                print(f"process {pid} has not exited after {_STOP_SECONDS:.0f} s", file=sys.stderr)
                return 1
            time.sleep(_POLL_SECONDS)
    print(f"stopped process {pid}")
    return 0


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid() -> int:
    return int(PID_FILE.read_text())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # the server must not outlive this process unnoticed
    raise SystemExit(main(sys.argv[1:]))
