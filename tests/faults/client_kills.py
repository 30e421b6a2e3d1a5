"""`make client-test`: kill a server under twenty clients of `unroll.client`; every output must be exact.

The server keeps its sessions in a folder. It is killed some time after it is ready and then restarted. The clients are
`Client` and `AsyncClient`, over HTTP and over streams; they must notice only delays.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from faults.replica import Replica, tiny_repository
from oracle import Oracle

from unroll.client import AsyncClient, AsyncSession, AsyncStreamSession, Client, Session, StreamSession

MODEL = "tiny"
#: Maximum seconds from ready to kill, and the seconds for which a client retries a request.
_LIFE, _RETRY_FOR = 0.8, 120.0


@dataclass
class Past:
    """The inputs and outputs of one client."""

    kind: str
    inputs: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)
    position: int = 0

    def fault(self, oracle: Oracle) -> str | None:
        x, y = np.concatenate(self.inputs), np.concatenate(self.outputs)
        if self.position != len(x):
            return f"{self.kind}: {len(x)} steps were answered, and the session is at {self.position}"
        return None if np.array_equal(oracle(x), y) else f"{self.kind}: wrong outputs"


@dataclass
class Result:
    kills: int
    clients: int
    steps: int
    faults: list[str]

    def __str__(self) -> str:
        return f"{self.kills} kills under {self.clients} clients, {self.steps} steps: {len(self.faults)} wrong"


class _Clients:
    """Clients of four kinds that step until stopped."""

    def __init__(self, url: str, features: int, seed: int) -> None:
        self._url, self._features, self._seed = url, features, seed
        self.stop = threading.Event()
        self.pasts: list[Past] = []

    async def run(self, of_each: int) -> None:
        """Raise the first error of any client."""
        async with asyncio.TaskGroup() as group:
            for _ in range(of_each):
                group.create_task(asyncio.to_thread(self._over_http))
                group.create_task(asyncio.to_thread(self._over_stream))
            group.create_task(self._asynchronous(of_each))

    def _past(self, kind: str) -> tuple[Past, Callable[[], np.ndarray]]:
        self.pasts.append(Past(kind))
        numbers = np.random.default_rng(self._seed + len(self.pasts))
        return self.pasts[-1], lambda: numbers.standard_normal((numbers.integers(1, 5), self._features), np.float32)

    def _over_http(self) -> None:
        with Client(self._url, retry_for=_RETRY_FOR) as client, client.session(MODEL) as session:
            self._live(session, "Client")

    def _over_stream(self) -> None:
        with Client(self._url, retry_for=_RETRY_FOR) as client, client.stream(MODEL) as stream:
            (session,) = stream.open()
            self._live(session, "Stream")

    def _live(self, session: Session | StreamSession, kind: str) -> None:
        past, chunk = self._past(kind)
        while not (self.stop.is_set() and past.outputs):
            past.inputs.append(chunk())
            past.outputs.append(session.steps(past.inputs[-1]))  # type: ignore[arg-type]
            self.stop.wait(0.01)
        past.position = session.position

    async def _asynchronous(self, of_each: int) -> None:
        async with AsyncClient(self._url, retry_for=_RETRY_FOR) as client, client.stream(MODEL) as stream:
            streamed = await stream.open(of_each)
            sessions = [await client.session(MODEL) for _ in range(of_each)]
            lives = [self._async_life(session, "AsyncClient") for session in sessions]
            await asyncio.gather(*lives, *[self._async_life(session, "AsyncStream") for session in streamed])

    async def _async_life(self, session: AsyncSession | AsyncStreamSession, kind: str) -> None:
        past, chunk = self._past(kind)
        while not (self.stop.is_set() and past.outputs):
            past.inputs.append(chunk())
            past.outputs.append(await session.steps(past.inputs[-1]))  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
        past.position = session.position


async def run(folder: Path, seed: int, *, kills: int, of_each: int = 5) -> Result:
    repository = tiny_repository(folder)
    server = Replica("server", repository, folder, "--store", f"file://{folder}/store")
    oracle = Oracle(repository, MODEL)
    clients = _Clients(f"http://127.0.0.1:{server.port}", oracle.manifest.inputs[0].shape[0], seed)
    chance = random.Random(seed)
    try:
        await server.start()
        living = asyncio.create_task(clients.run(of_each))
        for done in range(kills):
            await asyncio.wait([living], timeout=chance.uniform(0, _LIFE))
            if living.done():
                break
            server.kill()
            await server.start()
            if (done + 1) % 50 == 0:
                print(f"{done + 1} kills", flush=True)
        clients.stop.set()
        await living
    finally:
        clients.stop.set()
        server.kill()
    faults = [fault for past in clients.pasts if (fault := past.fault(oracle)) is not None]
    return Result(kills, len(clients.pasts), sum(past.position for past in clients.pasts), faults)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.client_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="client-kills-"))
    result = asyncio.run(run(folder, arguments.seed, kills=arguments.kills))
    for fault in result.faults:
        print(fault, file=sys.stderr)
    print(result)
    if not result.faults:
        shutil.rmtree(folder)
    return 1 if result.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
