"""`make soak`: opens and closes sessions in every way, and checks for leftovers.

Server and client share one process, so a leak in either shows. Tombstones are kept only briefly: with the default,
memory would grow for an hour before it levels off.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter

import httpx
import numpy as np
from faults.replica import tiny_repository
from serving import RAW, Running
from waiting import reached
from websockets.sync.client import ClientConnection, connect

from unroll.service.access.keys import new_key
from unroll.service.settings import Settings

MODEL, FEATURES = "tiny", 2
_STEP = np.full((1, FEATURES), 0.5, np.float32)
_RAW = {**RAW, "Unroll-Steps": "1"}
#: Sessions opened per stream message.
_AT_ONCE = 100


@dataclass(frozen=True)
class Census:
    """The resources that the process holds."""

    sessions: int
    rows: int
    leaving: int
    remembered: int
    tenants: int
    spilled: int
    in_flight: int
    waiting_steps: int
    reply_bytes: int
    streams: int
    tasks: int
    descriptors: int
    objects: int
    resident: int

    def tables(self) -> dict[str, int]:
        """Return the values that must be equal after every round."""
        measured = {"objects", "resident"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in measured}


class Soak:
    """A server with two tenants, and a client of each."""

    def __init__(self, folder: Path) -> None:
        keys = [new_key(tenant, tenant, ["infer"]) for tenant in ("first", "second")]
        path = folder / "keys.toml"
        path.write_text("\n".join(entry for _, entry in keys))
        self.running = Running(
            Settings(
                repository=tiny_repository(folder),
                keys=path,
                snapshot_keys=("k" * 16,),  # type: ignore[arg-type]
                tombstone_life=1e-6,
                log_level="error",
            )
        )
        self._keys = [{"Authorization": f"Bearer {secret}"} for secret, _ in keys]
        self._open = ExitStack()
        self._open.callback(self.running.stop)
        clients = (httpx.Client(base_url=self.running.url, headers=headers) for headers in self._keys)
        self._clients = [self._open.enter_context(client) for client in clients]
        self._streams = [self._open.enter_context(self._stream(headers)) for headers in self._keys]
        self._number = itertools.count()
        self._tasks = 0  # asyncio tasks of the idle server and the census
        self.census()

    def close(self) -> None:
        self._open.close()

    def _stream(self, headers: dict[str, str]) -> connect:
        url = f"ws://{self.running.address}/v1/models/{MODEL}/stream"
        return connect(url, additional_headers=headers, max_size=None, compression=None)

    def round(self) -> int:
        """Open and close sessions in every way for each tenant; return their number."""
        return sum(sum(self._ways(tenant)) for tenant in range(len(self._keys)))

    def _ways(self, tenant: int) -> Iterator[int]:
        yield self._by_request(self._clients[tenant])
        for _ in range(20):
            yield self._by_sequence(self._clients[tenant])
        for _ in range(10):
            yield self._by_stream(self._streams[tenant])
        yield self._by_dropped_stream(tenant)

    def _by_request(self, client: httpx.Client) -> int:
        """Fork a session and restore the fork to an earlier state."""
        sessions = f"/v1/models/{MODEL}/sessions"
        first, fork = (f"{sessions}/{kind}{next(self._number)}" for kind in "ab")
        client.post(sessions, json={"session_id": Path(first).name}).raise_for_status()
        state = client.get(f"{first}/state").raise_for_status().content
        client.post(f"{first}/steps", content=_STEP.tobytes(), headers=_RAW).raise_for_status()
        client.post(f"{first}/fork", json={"session_id": Path(fork).name}).raise_for_status()
        client.put(f"{fork}/state", content=state, headers=RAW).raise_for_status()
        for path in (first, fork):
            client.delete(path).raise_for_status()
        return 2

    def _by_sequence(self, client: httpx.Client) -> int:
        """Start and end an Open Inference Protocol sequence in one request."""
        document = {
            "inputs": [
                {"name": "x", "shape": [1, 1, FEATURES], "datatype": "FP32", "data": _STEP.ravel().tolist()},
            ],
            "parameters": {
                "sequence_id": f"s{next(self._number)}",
                "sequence_start": True,
                "sequence_end": True,
                "sequence_position": 0,
            },
        }
        client.post(f"/v2/models/{MODEL}/infer", json=document).raise_for_status()
        return 1

    def _by_stream(self, stream: ClientConnection) -> int:
        opened = _ask(stream, op="open", sessions=[{"handle": handle} for handle in range(_AT_ONCE)])
        assert all("error" not in item for item in opened["sessions"]), opened
        closed = _ask(stream, op="close", handles=list(range(_AT_ONCE)))
        assert all("error" not in item for item in closed["sessions"]), closed
        return _AT_ONCE

    def _by_dropped_stream(self, tenant: int) -> int:
        """Lose the connection, then close its session by a request."""
        name = f"d{next(self._number)}"
        with self._stream(self._keys[tenant]) as stream:
            _ask(stream, op="open", sessions=[{"handle": 0, "session_id": name}])
            stream.socket.shutdown(2)
        self._clients[tenant].delete(f"/v1/models/{MODEL}/sessions/{name}").raise_for_status()
        return 1

    def census(self) -> Census:
        """Wait until the server has noticed all ended sessions and connections."""
        gc.collect()
        return asyncio.run_coroutine_threadsafe(self._census(), self.running.uvicorn.loop).result()

    async def _census(self) -> Census:
        app, scheduler = self.running.server, self.running.model(MODEL).scheduler
        table = scheduler.sessions
        await reached(lambda: len(app.streams) == len(self._streams), "the end of the dropped streams")
        self._tasks = self._tasks or len(asyncio.all_tasks())
        await reached(lambda: len(asyncio.all_tasks()) <= self._tasks, "the end of their tasks")
        return Census(
            sessions=len(table),
            rows=table.slots.taken + scheduler.workspaces.taken,
            leaving=len(table.everyone) - len(table),
            remembered=len(table.closed),
            tenants=len(table.of_tenants),
            spilled=sum(app.sessions.directory.spilled.of_tenants.values()),
            in_flight=scheduler.in_flight,
            waiting_steps=round(scheduler.estimated_wait() / (scheduler.pace.seconds_per_step or 1)),
            reply_bytes=scheduler.replay.kept_bytes,
            streams=len(app.streams),
            tasks=len(asyncio.all_tasks()),
            descriptors=len(os.listdir("/proc/self/fd")),
            objects=len(gc.get_objects()),
            resident=_resident(),
        )


def _ask(stream: ClientConnection, **message: object) -> dict:
    stream.send(json.dumps(message))
    return json.loads(stream.recv())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(cycles: list[int], values: list[int]) -> float:
    """Return the growth per cycle. The first fifth is left out, because caches fill during it."""
    begin = len(cycles) // 5
    return float(np.polyfit(cycles[begin:], values[begin:], 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=1_000_000)
    wanted: int = parser.parse_args().cycles
    with tempfile.TemporaryDirectory() as folder, closing(Soak(Path(folder))) as soak:
        cycles, found, began = [0], [soak.census()], perf_counter()
        done, due = 0, 0
        while done < wanted:
            done += soak.round()
            if done >= due:
                due = done + wanted // 50
                cycles.append(done)
                found.append(soak.census())
                megabytes = found[-1].resident / 2**20
                print(
                    f"{done:9,} cycles  {perf_counter() - began:6.0f} s  {megabytes:7.1f} MB  {found[-1]}", flush=True
                )
    growing = {
        name: values
        for name in found[1].tables()
        if len(values := {getattr(census, name) for census in found[len(found) // 5 :]}) > 1
    }
    objects = slope(cycles, [census.objects for census in found])
    resident = slope(cycles, [census.resident for census in found])
    print(f"objects {objects:+.5f} and bytes {resident:+.3f} for each cycle; tables that changed: {growing or 'none'}")
    return 1 if growing or objects > 0.01 or resident > 10 else 0


if __name__ == "__main__":
    sys.exit(main())
