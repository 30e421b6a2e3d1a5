"""Curves over the number of clients and over their request rate, and a ramp of new clients."""

import asyncio
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import uvloop

from bench import subjects
from bench.load import Client, Load, Measurement
from bench.outcomes import Outcome, Row, at_most
from bench.subjects import Subject
from bench.turns import Bench, Servers, require_no_errors

_COUNTS = (1, 4, 16, 64, 256)
_SHARES = (0.25, 0.5, 0.75, 0.9)
_CURVES = ("naive", "triton")
_CURVE_REPEATS = 3
#: Clients that stream all the time, and clients that arrive in each turn.
_STREAMING, _ARRIVING = 256, 64


def clients(bench: Bench) -> list[Outcome]:
    """Throughput and latency over the number of clients."""
    with bench.servers() as servers:
        turns = [turn for subject in _compared_subjects(bench, servers) for turn in servers.turns(subject, _COUNTS)]
        rows = bench.alternate(turns, min(bench.repeats, _CURVE_REPEATS))
    return [Outcome("clients", "Over the number of HTTP clients, LSTM 2×64", "steps/s", rows)]


def open_loop(bench: Bench) -> list[Outcome]:
    """Latency over the request rate, as a share of each server's rate in a closed loop of 64 clients."""
    with bench.servers() as servers:
        groups = {}
        for subject in _compared_subjects(bench, servers):
            port = servers.server(subject.launch).port
            groups[subject] = port, [subject.client(number) for number in range(64)]
        closed = bench.alternate([servers.load_turn(subject, *group) for subject, group in groups.items()])
        rates = {row.name: row.rate for row in closed}
        turns = [
            servers.load_turn(subject, *group, share, share * rates[subject.name])
            for subject, group in groups.items()
            if subject.name in rates
            for share in _SHARES
        ]
        rows = bench.alternate(turns, min(bench.repeats, _CURVE_REPEATS))
    title = "Open loop: requests due at a fixed rate, a share of the closed loop's; latency since they were due"
    return [Outcome("open-loop", title, "steps/s", [*closed, *rows])]


def _compared_subjects(bench: Bench, servers: Servers) -> Iterator[Subject]:
    reference = bench.models["small"]
    yield subjects.echo(reference.features)
    yield subjects.raw_steps(bench.unroll(), reference)
    yield from bench.peer_subjects(
        servers,
        lambda peer, launch: subjects.peer_steps(peer, launch, reference) if peer.name in _CURVES else None,
    )


def ramp(bench: Bench) -> list[Outcome]:
    """64 clients connect, open a session and take a first step, while 256 keep the server busy."""
    reference = bench.models["small"]
    with bench.servers() as servers:
        subject = subjects.raw_steps(bench.unroll(), reference)
        port = servers.server(subject.launch).port
        streaming = [subject.client(number) for number in range(_STREAMING)]
        busy = servers.load_turn(subject, port, streaming)
        busy.check()
        measured: list[tuple[Measurement, Measurement]] = []
        worst = []
        for repeat in range(bench.repeats):
            first = _STREAMING + repeat * _ARRIVING
            arriving = [subject.client(number) for number in range(first, first + _ARRIVING)]
            streams, waits = uvloop.run(_ramp(port, streaming, arriving, bench.seconds))
            for client in arriving:
                subject.check(client)
            p50, p99 = np.percentile(waits, [50, 99]) * 1e3
            measured.append((streams, Measurement(len(waits) / max(waits), float(p50), float(p99))))
            worst.append(max(waits))
        busy.compare()
    streaming_runs, arriving_runs = zip(*measured, strict=True)
    rows = [
        Row("streaming", f"{_STREAMING} clients, one step a request, all the time", streaming_runs),
        Row("arriving", f"{_ARRIVING} clients: from connecting to the first step's answer; clients/s", arriving_runs),
    ]
    says = f"{_ARRIVING} clients arrive while {_STREAMING} stream: the slowest first answer"
    verdict = at_most(10, says, 1.0, max(worst), worst, " s")
    return [Outcome("ramp", "New clients at full load, LSTM 2×64", "steps/s", rows, [verdict])]


async def _ramp(
    port: int, streaming: list[Client], arriving: list[Client], seconds: float
) -> tuple[Measurement, list[float]]:
    async with Load(port, streaming) as load:
        await load.run_once()
        run = asyncio.create_task(load.run(seconds))
        await asyncio.sleep(seconds / 2)
        waits = await asyncio.gather(*(_arrive(port, client) for client in arriving))
        return require_no_errors("streaming", await run), waits


async def _arrive(port: int, client: Client) -> float:
    """Seconds."""
    began = perf_counter()
    async with Load(port, [client]) as load:
        require_no_errors("arriving", await load.run_once())  # the session
        require_no_errors("arriving", await load.run_once())  # its first step
    return perf_counter() - began
