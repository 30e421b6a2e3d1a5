"""The load generator behind `unroll bench`, for a model on a running server.

Each client has its own session and one request in flight. In an open loop, requests are due at the times of a Poisson
process. They go to the clients in turn, and wait there for the previous request.
"""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from multiprocessing import get_context
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from unroll.client.async_client import AsyncClient
from unroll.client.errors import ConnectionFailed, ServerError
from unroll.client.plot import bars
from unroll.client.tensors import Tensor

#: Seconds to wait for replies after the end of the run.
_PATIENCE = 30.0
_COLUMNS = 60
_LOCAL = {"127.0.0.1", "localhost", "::1"}

#: Sends one request; raises UnrollError if it is refused.
_Send = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run.

    Attributes:
        rate: Requests per second of an open loop; None for a closed loop.
        lengths: Time steps per request, used in turn.
    """

    url: str
    model: str
    clients: int
    rate: float | None
    lengths: tuple[int, ...]
    over: Literal["http", "stream"]
    seconds: float
    seed: int
    api_key: str | None = field(default=None, repr=False)


@dataclass(slots=True)
class Measured:
    """The measurements of a run.

    Attributes:
        ends: When each accepted request ended, in seconds since the start.
        latencies: How long each accepted request took, in seconds.
        steps: The number of accepted time steps.
        refused: The number of refused requests, by error code.
        cores: Processor cores that the load generator kept busy.
        load: The machine's load average at the end.
    """

    ends: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    steps: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cores: float = 0.0
    load: float = 0.0

    @property
    def accepted(self) -> int:
        return len(self.latencies)


def measure(plan: Plan, processes: int = 1) -> Measured:
    """Run the plan, with its clients divided among processes. Raises UnrollError if a session cannot be opened."""
    if processes == 1:
        return asyncio.run(_measure(plan))
    shares = [len(range(one, plan.clients, processes)) for one in range(processes)]
    plans = [
        replace(plan, clients=share, seed=plan.seed + one, rate=plan.rate and plan.rate * share / plan.clients)
        for one, share in enumerate(shares)
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        parts = list(pool.map(measure, plans))
    return Measured(
        ends=[end for part in parts for end in part.ends],
        latencies=[latency for part in parts for latency in part.latencies],
        steps=sum(part.steps for part in parts),
        refused=sum((part.refused for part in parts), Counter()),
        seconds=max(part.seconds for part in parts),
        cores=sum(part.cores for part in parts),
        load=max(part.load for part in parts),
    )


async def _measure(plan: Plan) -> Measured:
    rng = np.random.default_rng(plan.seed)
    async with AsyncExitStack() as stack:
        client = AsyncClient(plan.url, api_key=plan.api_key, retry_for=0.0, connections=0)
        await stack.enter_async_context(client)
        model = await client.model(plan.model)
        inputs = [_random(model.inputs, (length,), rng) for length in plan.lengths]
        static = _random(model.static, (), rng) or None
        senders: list[_Send] = []
        if plan.over == "stream":
            stream = await stack.enter_async_context(client.stream(plan.model))
            senders += [one.steps for one in await stream.open(plan.clients, static=static)]
        else:
            for _ in range(plan.clients):
                session = await stack.enter_async_context(client.session(plan.model, static=static))
                senders.append(session.steps)
        return await _Run(plan, inputs, senders, rng).measure()


class _Run:
    """Sends the requests of a process's clients."""

    def __init__(self, plan: Plan, inputs: list[Any], senders: Sequence[_Send], rng: np.random.Generator) -> None:
        self._plan, self._inputs, self._senders, self._rng = plan, inputs, senders, rng
        self._measured = Measured()

    async def measure(self) -> Measured:
        measured = self._measured
        self._begin, busy = time.perf_counter(), time.process_time()
        loop = self._closed if self._plan.rate is None else self._open
        try:
            async with asyncio.timeout(self._plan.seconds + _PATIENCE):
                await loop()
        except TimeoutError:
            measured.refused["no_reply"] += 1
        measured.seconds = time.perf_counter() - self._begin
        measured.cores = (time.process_time() - busy) / measured.seconds
        measured.load = os.getloadavg()[0]
        return measured

    async def _closed(self) -> None:
        end = self._begin + self._plan.seconds

        async def client(send: _Send, number: int) -> None:
            turns = self._turns(number)
            while (due := time.perf_counter()) < end:
                await self._request(send, next(turns), due)

        await asyncio.gather(*(client(send, number) for number, send in enumerate(self._senders)))

    async def _open(self) -> None:
        assert self._plan.rate is not None
        locks = [asyncio.Lock() for _ in self._senders]
        turns, due, number = self._turns(0), self._begin, 0

        async def request(client: int, length: int, due: float) -> None:
            async with locks[client]:
                await self._request(self._senders[client], length, due)

        async with asyncio.TaskGroup() as group:
            while (due := due + self._rng.exponential(1 / self._plan.rate)) < self._begin + self._plan.seconds:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(request(number % len(self._senders), next(turns), due))
                number += 1

    async def _request(self, send: _Send, length: int, due: float) -> None:
        measured = self._measured
        try:
            await send(self._inputs[length])
        except ServerError as error:
            measured.refused[error.code] += 1
            await asyncio.sleep(0)
        except ConnectionFailed:
            measured.refused["connection_failed"] += 1
            await asyncio.sleep(0.01)  # the failure may be immediate
        else:
            now = time.perf_counter()
            measured.ends.append(now - self._begin)
            measured.latencies.append(now - due)
            measured.steps += self._plan.lengths[length]

    def _turns(self, first: int) -> Iterator[int]:
        """Yield indices of lengths in turn."""
        count = len(self._inputs)
        return cycle([(first + one) % count for one in range(count)])


def _random(specs: Sequence[Tensor], leading: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Values that any model accepts: small floats, and integers 0 and 1."""
    made = {}
    for spec in specs:
        shape = (*leading, *spec.shape)
        values = rng.standard_normal(shape) if spec.numpy.kind == "f" else rng.integers(0, 2, shape)
        made[spec.name] = values.astype(spec.numpy)
    return made


# ── reports ──────────────────────────────────────────────────────────────────────────────────────


def _figures(plan: Plan, measured: Measured) -> dict[str, Any]:
    latencies = np.array(measured.latencies or [np.nan]) * 1e3
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99))
    return {
        "plan": {name: value for name, value in asdict(plan).items() if name != "api_key"},
        "accepted": measured.accepted,
        "refused": dict(measured.refused),
        "seconds": measured.seconds,
        "requests_per_second": measured.accepted / measured.seconds,
        "steps_per_second": measured.steps / measured.seconds,
        "latency_ms": {"p50": p50, "p90": p90, "p99": p99, "max": latencies.max()} if measured.accepted else None,
        "load_generator_cores": measured.cores,
        "machine_cores": os.cpu_count(),
        "machine_load": measured.load,
    }


def document(plan: Plan, measured: Measured) -> str:
    """The figures as one JSON document."""
    return json.dumps(_figures(plan, measured), indent=2)


def report(plan: Plan, measured: Measured, processes: int) -> str:
    """The figures as text, with plots of the rate over time and of the latency distribution."""
    found = _figures(plan, measured)
    loop = "closed loop" if plan.rate is None else f"open loop, {plan.rate:g} requests/s"
    lengths = ", ".join(map(str, plan.lengths))
    lines = [
        f"{plan.model} at {plan.url} over {plan.over}, {loop}; clients: {plan.clients}, steps per request: {lengths}",
        "",
        f"  accepted   {measured.accepted} in {measured.seconds:.1f} s: {found['requests_per_second']:.0f} requests/s, "
        f"{found['steps_per_second']:.0f} steps/s",
        f"  refused    {', '.join(f'{count} {code}' for code, count in measured.refused.items()) or 'none'}",
    ]
    if measured.accepted:
        lines += [
            f"  latency    {', '.join(f'{name} {value:.2f} ms' for name, value in found['latency_ms'].items())}",
            "",
            *_plots(measured),
        ]
    lines += [
        "",
        f"  The load generator kept {measured.cores:.1f} of this machine's {os.cpu_count()} cores busy; "
        f"load average {measured.load:.1f}.",
    ]
    if urlsplit(plan.url).hostname in _LOCAL:
        lines.append("  The server shares this machine's cores with the load generator: by itself it would be faster.")
    if measured.cores > 0.9 * processes:
        lines.append(f"  The load generator saturated a core and may be the limit; try --processes {processes + 1}.")
    return "\n".join(lines)


def _plots(measured: Measured) -> Iterator[str]:
    rates, _ = np.histogram(measured.ends, _COLUMNS, (0.0, measured.seconds))
    yield f"  rate       {bars(rates, 0, rates.max())}  over {measured.seconds:.1f} s"
    latencies = np.array(measured.latencies) * 1e3
    low, high = latencies.min(), max(latencies.max(), latencies.min() * 1.01)
    spread, _ = np.histogram(latencies, np.geomspace(low, high, _COLUMNS + 1))
    yield f"  latencies  {bars(spread, 0, spread.max())}  {low:.2f} to {high:.2f} ms, logarithmic"
