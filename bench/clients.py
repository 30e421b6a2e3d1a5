"""What the number of clients does, their arrival, and how much they ask: curves, and a ramp."""

import asyncio
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import uvloop

from bench import subjects
from bench.load import Client, Load, Measured
from bench.outcomes import Outcome, Row, Verdict
from bench.subjects import Subject
from bench.turns import Bench, Servers, raise_on_errors, turn_of

_COUNTS = (1, 4, 16, 64, 256)
_SHARES = (0.25, 0.5, 0.75, 0.9)
_CURVES = ("naive", "triton")
_CURVE_REPEATS = 3
#: Those who stream, and those who come while they do.
_STREAMING, _COMING = 256, 64


def clients(bench: Bench) -> list[Outcome]:
    """Rate and latency over the number of clients."""
    with bench.servers() as servers:
        turns = [turn for subject in _compared(bench, servers) for turn in servers.turns(subject, _COUNTS)]
        rows = bench.alternate(turns, min(bench.repeats, _CURVE_REPEATS))
    return [Outcome("clients", "Over the number of HTTP clients, LSTM 2×64", "steps/s", rows)]


def open_loop(bench: Bench) -> list[Outcome]:
    """Latency over the rate asked for, as a share of what each server answers in a closed loop of 64 clients."""
    with bench.servers() as servers:
        groups = {}
        for subject in _compared(bench, servers):
            port = servers.server(subject.launch).port
            groups[subject] = port, [subject.client(number) for number in range(64)]
        closed = bench.alternate([turn_of(subject, *group) for subject, group in groups.items()])
        rates = {row.name: row.rate for row in closed}
        turns = [
            turn_of(subject, *group, share, share * rates[subject.name])
            for subject, group in groups.items()
            if subject.name in rates
            for share in _SHARES
        ]
        rows = bench.alternate(turns, min(bench.repeats, _CURVE_REPEATS))
    title = "Open loop: requests due at a fixed rate, a share of the closed loop's; latency since they were due"
    return [Outcome("open-loop", title, "steps/s", [*closed, *rows])]


def _compared(bench: Bench, servers: Servers) -> Iterator[Subject]:
    reference = bench.models["small"]
    yield subjects.echo(reference.features)
    yield subjects.raw_steps(bench.unroll(), reference)
    yield from bench.of_peers(
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
        busy = turn_of(subject, port, streaming)
        busy.check()
        measured, worst = [], []
        for repeat in range(bench.repeats):
            first = _STREAMING + repeat * _COMING
            coming = [subject.client(number) for number in range(first, first + _COMING)]
            streams, waits = uvloop.run(_ramp(port, streaming, coming, bench.seconds))
            for client in coming:
                subject.check(client)
            p50, p99 = np.percentile(waits, [50, 99]) * 1e3
            measured.append((streams, Measured(len(waits) / max(waits), float(p50), float(p99))))
            worst.append(max(waits))
        busy.compare()
    streams, arrivals = zip(*measured, strict=True)
    rows = [
        Row("streaming", f"{_STREAMING} clients, one step a request, all the time", streams),
        Row("arriving", f"{_COMING} clients: from connecting to the first step's answer; clients/s", arrivals),
    ]
    says = f"{_COMING} clients arrive while {_STREAMING} stream: the slowest first answer"
    verdict = Verdict(10, says, 1.0, max(worst), min(worst), max(worst), at_least=False, unit=" s", judged=bench.judged)
    return [Outcome("ramp", "New clients at full load, LSTM 2×64", "steps/s", rows, [verdict])]


async def _ramp(
    port: int, streaming: list[Client], coming: list[Client], seconds: float
) -> tuple[Measured, list[float]]:
    async with Load(port, streaming) as load:
        await load.once()
        run = asyncio.create_task(load.run(seconds))
        await asyncio.sleep(seconds / 2)
        waits = await asyncio.gather(*(_arrive(port, client) for client in coming))
        return raise_on_errors("streaming", await run), waits


async def _arrive(port: int, client: Client) -> float:
    """Seconds."""
    began = perf_counter()
    async with Load(port, [client]) as load:
        raise_on_errors("arriving", await load.once())  # the session
        raise_on_errors("arriving", await load.once())  # its first step
    return perf_counter() - began
