"""Measures a durable session and a commit in Redis: memory, processor, append-only file, network.

    python -m bench.internals.store [--sessions 50000]

Starts a redis-server and writes to it as the server does, in batches of 64. The figures are Redis's own counters, which
are independent of other load on the machine. docs/scaling.md has the arithmetic.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from bench.servers import HOST, running_server
from deploy import local_redis
from unroll.service.store.interface import Commit, Store, Tokens
from unroll.service.store.record import Kept, Origin, pack, pack_last
from unroll.service.store.redis_store import RedisStore, RedisStoreConfig

_BATCH = 64
_PATIENCE_SECONDS = 60.0
#: 24 characters, the length of the ids that the server generates.
_ID = "{:024d}"


@dataclass(frozen=True, slots=True)
class Model:
    """The size of a model: floats of a state row, and of a step's reply, which is kept for retries."""

    name: str
    state: int
    output: int


MODELS = (Model("LSTM 2×64", 4 * 64, 16), Model("LSTM 2×256", 4 * 256, 64))


@contextmanager
def redis_server() -> Iterator[int]:
    """Yields the port of a server that is ready, without snapshots and without rewriting its append-only file."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--bind {HOST} --port PORT --dir {folder} --appendonly yes --appendfsync everysec"
        command = [local_redis.server_path(), *flags.split(), "--save", "", "--auto-aof-rewrite-percentage", "0"]
        with running_server(command, os.sched_getaffinity(0), Path(folder) / "log") as server:
            yield server.port


class RedisCounters:
    """Redis's own counters, and their change since `begin`."""

    def __init__(self, port: int) -> None:
        self._redis = Redis(port=port)
        self._begin: dict[str, float] = {}

    def begin(self) -> None:
        self._begin = self._read()

    def change_per(self, count: int) -> dict[str, float]:
        return {name: (value - self._begin[name]) / count for name, value in self._read().items()}

    def _read(self) -> dict[str, float]:
        info = self._redis.info("all")
        # Buffers come and go with the traffic; the keys stay.
        memory = info["used_memory"] - info["mem_aof_buffer"] - info["mem_clients_normal"]
        processor = info["used_cpu_user"] + info["used_cpu_sys"]
        file, network = info["aof_current_size"], info["total_net_input_bytes"]
        return {"memory": memory, "microseconds": 1e6 * processor, "file": file, "network": network}


class Sessions:
    """Sessions of one model; each commit follows the session's previous one."""

    def __init__(self, model: Model, count: int) -> None:
        self._model = model
        self._tokens = Tokens()
        self._tokens_by_id = {_ID.format(number): b"" for number in range(count)}
        self._origin = Origin("ab" * 32, "stored", os.urandom(16))

    async def write(self, store: Store, ids: list[str], *, opens: bool = False, ends: bool = False) -> None:
        for begin in range(0, len(ids), _BATCH):
            commits = [self._commit(each, opens, ends) for each in ids[begin : begin + _BATCH]]
            failed = [error for error in await store.commit(commits) if error is not None]
            if failed:
                raise failed[0]

    def _commit(self, each: str, opens: bool, ends: bool) -> Commit:
        expected, self._tokens_by_id[each] = self._tokens_by_id[each], self._tokens.next()
        row = os.urandom(4 * self._model.state)
        last = pack_last(1, (Kept(0, 1, os.urandom(16), os.urandom(4 * self._model.output)),))
        content = pack(self._origin.to_bytes(), 1, row, last)
        return Commit((self._model.name[:4], each), expected, self._tokens_by_id[each], content, opens, ends)

    @property
    def ids(self) -> list[str]:
        return [*self._tokens_by_id]


async def measure(model: Model, count: int) -> str:
    with redis_server() as port:
        counters = RedisCounters(port)
        store = RedisStore(RedisStoreConfig(f"redis://{HOST}:{port}/0", timeout=_PATIENCE_SECONDS))
        sessions = Sessions(model, count)
        counters.begin()
        await sessions.write(store, sessions.ids, opens=True)
        resident = counters.change_per(count)["memory"]
        counters.begin()
        await sessions.write(store, random.sample(sessions.ids, count))
        commit = counters.change_per(count)
        counters.begin()
        await sessions.write(store, sessions.ids, ends=True)
        ended = resident + counters.change_per(count)["memory"]
        await store.stop()
    costs = (resident, ended, commit["microseconds"], commit["file"], commit["network"])
    return f"| {model.name} | {4 * model.state:,} | " + " | ".join(f"{cost:,.0f}" for cost in costs) + " |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=50_000)
    count = parser.parse_args(argv).sessions
    print(
        "| | row, bytes | a session, bytes | an ended one, bytes | a commit: Redis, µs | file, bytes | network, bytes |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for model in MODELS:
        print(asyncio.run(measure(model, count)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
