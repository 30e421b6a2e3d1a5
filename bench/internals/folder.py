"""Many sessions in a folder: size, rates, server start, and removal of expired sessions.

    python -m bench.internals.folder [--sessions 1000000] [--in FOLDER]

Writes to the store as a server does, in batches of 64, and removes it at the end. docs/stores.md has the figures.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from os import sched_getaffinity
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from bench.internals.store import MODELS, Sessions
from bench.servers import ROOT, running_server
from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig

_LIFE_SECONDS = 86_400.0
_PATIENCE_SECONDS = 60.0
#: The maximum number of measured steps, and the number of starts.
_STEPS, _STARTS = 200_000, 3


async def measure(folder: Path, count: int) -> None:
    config = EmbeddedStoreConfig(folder, "everysec", _PATIENCE_SECONDS, _LIFE_SECONDS, _LIFE_SECONDS)
    store, sessions = EmbeddedStore(config), Sessions(MODELS[0], count)
    await store.start()
    watch = _Stopwatch()
    await sessions.write(store, sessions.ids, opens=True)
    _say(f"{MODELS[0].name}, {count:,} sessions opened", *watch.rate(count))
    await store.stop()
    _say("bytes of a session", _size(folder) / count, f"in a file of {_size(folder):,}")
    store = EmbeddedStore(config)
    await store.start()
    some = random.sample(sessions.ids, min(count, _STEPS))
    watch = _Stopwatch()
    await sessions.write(store, some)
    _say(f"{len(some):,} steps of random ones", *watch.rate(len(some)))
    await store.stop()
    _say("the same", _size(folder) / count, "bytes of the file a session")


def measure_starts(folder: Path, empty: Path) -> None:
    for where, what in ((empty, "an empty folder"), (folder, "it")):
        flags = ("--repository", str(ROOT / "service" / "doctor"), "--device", "cpu", "--port", "PORT")
        command = [sys.executable, "-m", "unroll", "serve", *flags, "--store", f"file://{where}"]
        seconds: list[float] = []
        for _ in range(_STARTS):
            with running_server(command, sched_getaffinity(0), empty.with_suffix(".log"), "/readyz") as server:
                seconds.append(server.start_seconds)
        _say(f"a server starts on {what} in", median(seconds), "seconds")


async def measure_sweep(folder: Path, count: int) -> None:
    """Measure the removal of expired sessions, and then of their tombstones."""
    store = EmbeddedStore(EmbeddedStoreConfig(folder, tombstone_life=_LIFE_SECONDS))
    for what in ("expired sessions reduced to their trace", "traces removed"):
        store._offset += 1.5 * _LIFE_SECONDS
        watch = _Stopwatch()
        store._sweep()
        while store._swept:
            store._sweep()
        _say(what, *watch.rate(count))
    _say("bytes in use then", store._folder.sizes()["used"], f"in a file of {_size(folder):,}")
    await store.stop()


class _Stopwatch:
    def __init__(self) -> None:
        self._began, self._processor = perf_counter(), process_time()

    def rate(self, count: int) -> tuple[float, str]:
        """The rate of `count` operations so far, and its unit with the processor time of one operation."""
        processor = (process_time() - self._processor) / count * 1e6
        return count / (perf_counter() - self._began), f"a second, {processor:.0f} µs of processor time each"


def _size(folder: Path) -> int:
    return (folder / "data.mdb").stat().st_size


def _say(what: str, value: float, unit: str) -> None:
    print(f"{what}: {value:,.{0 if value > 100 else 2}f} {unit}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument(
        "--in", dest="place", type=Path, help="where to make the folder; default: among temporary files"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.place) as made:
        folder, empty = Path(made, "store"), Path(made, "empty")
        asyncio.run(measure(folder, options.sessions))
        measure_starts(folder, empty)
        asyncio.run(measure_sweep(folder, options.sessions))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
