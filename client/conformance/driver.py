"""Drives the client under test: a program that reads commands and writes outcomes, one line of JSON each."""

import asyncio
import json
import shlex
from typing import Any

#: The most bytes in a line.
_LINE = 2**24


class DriverFailed(Exception):
    """The program violates the contract, has ended, or does not answer."""


class Driver:
    """Runs the program, with a time limit per command in seconds."""

    def __init__(self, command: str, limit: float) -> None:
        self._command = shlex.split(command)
        self._limit = limit
        self._process: asyncio.subprocess.Process | None = None

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send a command and return its outcome. Raises DriverFailed."""
        process = self._process or await self._start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            async with asyncio.timeout(self._limit):
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            await self.stop()
            raise DriverFailed(f"no outcome within {self._limit:g} s") from None
        except ConnectionError:
            line = b""
        if not line:
            status = await process.wait()
            self._process = None
            raise DriverFailed(f"the program ended, with status {status}")
        try:
            outcome = json.loads(line)
        except ValueError:
            outcome = None
        if not isinstance(outcome, dict) or len(outcome.keys() & {"ok", "error", "unsupported"}) != 1:
            await self.stop()
            raise DriverFailed(f"it wrote {line[:200].decode(errors='replace').strip()!r}, which is no outcome")
        return outcome

    async def _start(self) -> asyncio.subprocess.Process:
        """Start the program. Raises DriverFailed."""
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=_LINE)
        except OSError as error:
            raise DriverFailed(f"{self._command[0]!r} cannot be started: {error}") from error
        return self._process

    async def stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            if process.returncode is None:
                process.kill()
            await process.wait()
