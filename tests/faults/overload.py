"""`make overload`: attack a real server from another process while a calm client steps and a probe checks it.

Each attack lasts some seconds. The table shows the latencies of the calm client and the probe, the growth of the
server's memory, and the answers to the attackers.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import struct
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from faults import flood
from faults.attacks import ATTACKS
from faults.replica import ROOT, Replica, tiny_repository

MODEL, FEATURES = "tiny", 2
#: Seconds between two steps of the calm client, and between two probes.
_STEP_PAUSE, _PROBE_PAUSE = 0.01, 0.05
#: One more attack: a tenant that sends valid requests, but far too many.
_FLOOD = "a tenant that floods"
_COLUMNS = ("attack", "calm p50/p99 alone, ms", "under attack", "steps", "probe", "memory", "the attackers got")


@dataclass
class Calm:
    """Measurements of a calm client: seconds per step and per probe, and the server's peak memory in bytes."""

    steps: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    memory: int = 0

    def percentile(self, share: int) -> float:
        return statistics.quantiles(self.steps, n=100)[share - 1] if len(self.steps) > 1 else float("inf")

    @property
    def slowest_probe(self) -> float:
        return max(self.probes, default=float("inf"))


@dataclass
class Row:
    """The result of one attack. answer: a summary of the answers the attackers got."""

    attack: str
    alone: Calm
    under: Calm
    answer: str

    def cells(self) -> tuple[str, ...]:
        times = ["/".join(f"{1e3 * calm.percentile(p):.1f}" for p in (50, 99)) for calm in (self.alone, self.under)]
        probe, growth = 1e3 * self.under.slowest_probe, (self.under.memory - self.alone.memory) / 2**20
        return self.attack, *times, str(len(self.under.steps)), f"{probe:.0f} ms", f"{growth:+.0f} MB", self.answer


class _Connection:
    """An HTTP connection with one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "_Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def request(self, method: str, path: str, body: bytes = b"", *headers: str) -> None:
        """Send a request; the answer must be a success."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "\r\n"]
        self._writer.write("\r\n".join(lines).encode() + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(": ") for line in head.decode().split("\r\n")[1:-2])
        content = await self._reader.readexactly(int(fields.get("content-length", 0)))
        assert head.startswith(b"HTTP/1.1 2"), (head, content)


async def observe(server: Replica, meanwhile: Awaitable[object]) -> Calm:
    """Step and probe, at least once, until `meanwhile` ends. Wait for outstanding requests and count them."""
    calm, over = Calm(), asyncio.ensure_future(meanwhile)
    session = f"/v1/models/{MODEL}/sessions/calm"
    step = "POST", f"{session}/steps", struct.pack(f"<{FEATURES}f", *[0.5] * FEATURES)
    headers = "Content-Type: application/octet-stream", "Unroll-Steps: 1"

    async def repeat(times: list[float], pause: float, request: Callable[[], Awaitable[None]]) -> None:
        while not (over.done() and times):
            began = perf_counter()
            await request()
            times.append(perf_counter() - began)
            calm.memory = max(calm.memory, resident(server.pid))
            await asyncio.wait([over], timeout=pause)

    async with _Connection(server.port) as stepping, _Connection(server.port) as probing:
        await asyncio.gather(
            repeat(calm.steps, _STEP_PAUSE, lambda: stepping.request(*step, *headers)),
            repeat(calm.probes, _PROBE_PAUSE, lambda: probing.request("GET", "/readyz")),
            over,
        )
    return calm


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


async def attacked(server: Replica, attack: str, seconds: float) -> Row:
    """Measure the server without load, then under attack by another process."""
    sessions, calm = f"/v1/models/{MODEL}/sessions", json.dumps({"session_id": "calm"}).encode()
    async with _Connection(server.port) as first:
        await first.request("POST", sessions, calm, "Content-Type: application/json")
    alone = await observe(server, asyncio.sleep(seconds / 2))
    command = [sys.executable, "-m", "faults.attacks", attack, str(server.port), str(seconds)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT / "tests", stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()  # the attack has begun
    answer: list[str] = []

    async def rest() -> None:
        output, _ = await process.communicate()
        answer.append(output.decode().strip())

    under = await observe(server, rest())
    assert process.returncode == 0, attack
    return Row(attack, alone, under, answer[0])


async def run(folder: Path, attacks: Sequence[str], seconds: float) -> list[Row]:
    """Run each attack on a separate server."""
    repository = tiny_repository(folder)
    rows = []
    for i, attack in enumerate(attacks):
        server = Replica(f"server-{i}", repository, folder)
        try:
            await server.start()
            rows.append(await attacked(server, attack, seconds))
            print("  ".join(rows[-1].cells()), flush=True)
        finally:
            server.kill()
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    names = [*ATTACKS, _FLOOD]
    parser = argparse.ArgumentParser(prog="python -m faults.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each attack")
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="ATTACK")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="overload-"))
    attacks = [name for name in arguments.only if name != _FLOOD]
    if attacks:
        print(table(asyncio.run(run(folder / "attacks", attacks, arguments.seconds))))
    if _FLOOD in arguments.only:
        print(flood.table(*asyncio.run(flood.run(folder / "flood", arguments.seconds))))
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
