"""Hundreds of concurrent sessions, every transport, every mistake: no state is lost, mixed up or advanced twice."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing

import pytest
import tritonclient.http.aio as triton
from crowd import Client, Track, Wires, check_snapshot
from fake_cuda.device import FakeDevice
from serving import Oracle, Running, Serve, SlowEngine, metric

from unroll.service import app
from unroll.service.engine import backend

#: `make crowd-test` runs more seeds and more rounds.
SEEDS = [int(seed) for seed in os.environ.get("UNROLL_TEST_SEEDS", "20261").split(",")]
CLIENTS = 200
ROUNDS = 16 if "UNROLL_TEST_SEEDS" in os.environ else 4
AT_ONCE = 64
BATCH_SECONDS = 0.02

#: Events that must each happen at least once for the test to be meaningful.
EVERYTHING = {
    *("step", "retry", "twins", "leave_and_retry", "fork", "close", "finish", "restart", "start", "look", "save"),
    *("restore", "position_gap", "payload_mismatch", "position_too_old", "malformed_request", "non_finite_input"),
    *("non_finite_output", "session_unknown", "session_closed", "session_evicted"),
}


@pytest.fixture(params=["cpu", pytest.param("two GPUs", marks=pytest.mark.long)])
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The fake GPUs use host memory and onnxruntime runs their layers on the CPU, so results are bit for bit too."""
    if request.param == "cpu":
        return {"session_capacity": 140, "spill_bytes": 0}
    monkeypatch.setattr(app, "resolve_devices", lambda wanted: (("cuda:0", "cuda:1"), "there are two"))
    monkeypatch.setattr(backend, "open_cuda", lambda device: FakeDevice())
    return {"session_capacity": 70, "spill_bytes": 0, "cells": "onnxruntime"}


@pytest.mark.parametrize("seed", SEEDS)
async def test_everyone_at_once(serve: Serve, oracle: Callable[..., Oracle], settings: dict, seed: int) -> None:
    running = serve(max_batch=16, piece_steps=4, idle_timeout=0, **settings)
    for model in running.server.models:
        SlowEngine(model.loop, BATCH_SECONDS).__enter__()
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    models = {"hot": oracle("hot"), "gru": oracle("gru", "2")}
    async with triton.InferenceServerClient(running.address, conn_limit=AT_ONCE) as triton_client:
        with closing(Wires(running.port, triton_client)) as wires:
            clients = []
            for i in range(CLIENTS):
                model = "gru" if i % 4 == 0 else "hot"  # there is room for all of gru's, but not for all of hot's
                name = str(1000 + i) if i % 3 else f"s{i}"
                track = Track(model, name, models[model], evictable=model == "hot", gone="session_unknown")
                clients.append(Client(track, wires, random.Random(chance.getrandbits(32)), outcomes))
            for client in clients:
                await client.open(client.tracks[0])
            turns = [client for client in clients for _ in range(ROUNDS)]
            chance.shuffle(turns)
            await _all(turns)

            tracks = [track for client in clients for track in client.tracks]
            for track in tracks:
                await _settle(track, wires, outcomes)
            text = await wires.metrics()
    _account(running, text, tracks, outcomes)
    shared = 1 - metric(text, "unroll_batch_rows_bucket", le="1") / metric(text, "unroll_batch_rows_sum")
    counts = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
    print(f"\nseed {seed}: {sum(outcomes.values())} outcomes, {shared:.0%} of the rows in shared batches: {counts}")


async def _all(turns: list[Client]) -> None:
    """Run all turns, AT_ONCE clients at a time, with one action at a time per client."""
    busy: set[int] = set()
    free = asyncio.Condition()
    waiting = list(reversed(turns))

    async def worker() -> None:
        while True:
            async with free:
                await free.wait_for(lambda: not waiting or any(id(client) not in busy for client in waiting[-AT_ONCE:]))
                if not waiting:
                    return
                at = next(i for i in range(len(waiting) - 1, -1, -1) if id(waiting[i]) not in busy)
                client = waiting.pop(at)
                busy.add(id(client))
            try:
                await client.act()
            finally:
                async with free:
                    busy.remove(id(client))
                    free.notify_all()

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())


async def _settle(track: Track, wires: Wires, outcomes: Counter[str]) -> None:
    """Check a session at the end: its position, the exact bits of its state, and its outputs."""
    reply = await wires.call("GET", track, "/state")
    track.check()
    if track.gone is not None:
        assert (reply.status, reply.code) == (410, track.gone)
    elif reply.status == 410:
        assert track.evictable
        assert reply.code == "session_evicted"
        track.gone = reply.code
        outcomes["evicted"] += 1
    else:
        assert reply.status == 200
        assert reply.position == track.position
        check_snapshot(track, reply.outputs)


def _account(running: Running, text: str, tracks: list[Track], outcomes: Counter[str]) -> None:
    """Check that the server's metrics agree with the clients' counts."""
    assert metric(text, "unroll_chunks_in_flight") == 0
    assert metric(text, "unroll_estimated_wait_seconds") == 0
    for name in ("hot", "gru"):
        serving = [model for model in running.server.models if model.name == name]
        for model in serving:
            model.scheduler.check_invariants()
        alive = sum(track.model == name and track.gone is None for track in tracks)
        assert metric(text, "unroll_sessions", model=name) == alive
        newest = [len(model.scheduler.sessions) for model in serving if model.version == serving[-1].version]
        assert min(newest) > 0.2 * sum(newest), "one of the devices has hardly any sessions"
    rows, alone = metric(text, "unroll_batch_rows_sum"), metric(text, "unroll_batch_rows_bucket", le="1")
    devices = len({model.serving.device for model in running.server.models})
    # Two devices with two batches in flight each: a step has four places to run next.
    assert alone < (0.75 if devices == 1 else 0.9) * rows, "sessions hardly ever shared a batch"
    applied = sum(track.applied for track in tracks)
    assert applied <= metric(text, "unroll_steps_total") <= applied + sum(track.doubtful for track in tracks)
    assert metric(text, "unroll_sessions_gone_total", code="session_evicted") == outcomes["evicted"] > 0
    assert metric(text, "unroll_sessions_opened_total") == outcomes["opened"]
    assert metric(text, "unroll_sessions_restarted_total") == outcomes["restart"]
    assert metric(text, "unroll_failed_total", code="non_finite_output") == outcomes["non_finite_output"]
    assert outcomes.keys() >= EVERYTHING, f"nobody met {EVERYTHING - outcomes.keys()}"
