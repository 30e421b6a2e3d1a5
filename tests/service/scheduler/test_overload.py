"""More work than capacity, on a simulated clock: which clients are refused, and how long the rest wait."""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from fold import scheduler

from unroll.service.core.errors import Overloaded
from unroll.service.scheduler.chunk import Chunk
from unroll.service.scheduler.reply import Reply
from unroll.service.scheduler.scheduler import Scheduler


@dataclass
class Client:
    """A simulated client.

    Attributes:
        length: Steps per sequence.
        deadline: In seconds.
        refused: Times of refusal.
        waited: Time of each answer and the seconds it took.
    """

    tenant: str = ""
    length: int = 1
    patient: bool = False
    deadline: float = 30.0
    refused: list[float] = field(default_factory=list)
    waited: list[tuple[float, float]] = field(default_factory=list)
    on_answer: Callable[[float], None] = lambda now: None
    on_refused: Callable[[float], None] = lambda retry_after: None

    def p99(self, since: float = 0.0) -> float:
        return float(np.quantile([seconds for at, seconds in self.waited if at >= since], 0.99))


class Machine:
    """A scheduler with batches that take `call` seconds plus `row` seconds per row and step."""

    def __init__(self, call: float, row: float, **limits: float) -> None:
        sizes: dict[str, float] = {
            "max_batch": 256,
            "max_batch_steps": 2048,
            "piece_steps": 64,
            "max_queue": 8192,
            "overload_wait": 0.02,
        }
        self.scheduler: Scheduler = scheduler(**(sizes | limits))  # type: ignore[arg-type]
        self.call, self.row = call, row
        full = call + 256 * row
        self.capacity = 256 / full
        self.scheduler.pace.seconds_per_step = full / 256
        cheap = min(n for n in range(1, 257) if (call + n * row) / n <= 1.03 * full / 256)
        self.scheduler.overload.efficient_seconds = call + cheap * row
        self.now = 0.0
        self.most_in_flight = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), do))

    def send(self, client: Client) -> None:
        chunk = Chunk((np.ones(client.length, np.int64),))
        chunk.tenant, chunk.patient = client.tenant, client.patient
        sent = self.now

        def answered(outcome: object) -> None:
            if isinstance(outcome, Overloaded):
                refused(outcome)
                return
            assert isinstance(outcome, Reply), outcome
            client.waited.append((sent, self.now - sent))
            client.on_answer(self.now)

        def refused(error: Overloaded) -> None:
            client.refused.append(self.now)
            client.on_refused(error.retry_after)

        try:
            self.scheduler.submit(chunk, self.now, self.now + client.deadline)
        except Overloaded as error:
            refused(error)
            return
        chunk.listeners = (answered,)
        self.most_in_flight = max(self.most_in_flight, self.scheduler.in_flight)

    def arrivals(self, client: Client, rate: float, start: float, end: float) -> None:
        def arrive() -> None:
            self.send(client)
            later = self.now + random_.expovariate(rate)
            if later < end:
                self.at(later, arrive)

        random_ = random.Random(7)
        self.at(start, arrive)

    def loop_of(self, clients: Iterable[Client], start: float = 0.0) -> None:
        """Let each client send its next request on the answer to its last one."""
        for client in clients:
            client.on_answer = lambda now, client=client: self.at(now, lambda: self.send(client))  # type: ignore[misc]
            self.at(start, lambda client=client: self.send(client))  # type: ignore[misc]

    def run(self, until: float) -> None:
        while self.now < until and (self._events or not self.scheduler.idle):
            _, batch = self.scheduler.next_turn(self.now)
            if not batch.rows:
                self._deliver(self._events[0][0])
                continue
            seconds = self.call + batch.steps * self.row
            self._deliver(self.now + seconds)
            rows = batch.rows
            outputs = np.zeros((rows, batch.longest), np.int64), np.zeros(rows, np.int64)
            self.scheduler.complete(batch, outputs, {}, self.now, seconds)
            self._deliver(self.now)

    def _deliver(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = until


#: Maximum wait of new work during an overload, in seconds.
TARGET = 0.02
#: (seconds per call, seconds per row): a call that costs about the same for any number of rows, a call with a cost
#: proportional to its rows, and a slow call.
MACHINES = [(1e-2, 8e-5), (4e-4, 4e-4), (5e-2, 1e-4)]
machines = pytest.mark.parametrize("costs", MACHINES)


@machines
def test_accepted_work_waits_about_as_long_at_five_times_the_capacity_as_below_it(
    costs: tuple[float, float],
) -> None:
    """Measured once the overload is detected, which takes a queue of more than 256."""
    clients = {0.8: Client(), 5.0: Client()}
    for load, client in clients.items():
        machine = Machine(*costs)
        machine.arrivals(client, load * machine.capacity, 0.0, 1.0)
        machine.run(10.0)
    calm, busy = clients[0.8], clients[5.0]
    assert not calm.refused
    assert busy.p99(0.4) <= 2 * calm.p99() + TARGET
    assert len(busy.waited) >= 0.9 * machine.capacity, "work was refused that could have run"


@machines
@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["at once", "one after another"])
def test_clients_that_await_each_answer_are_not_refused(costs: tuple[float, float], seconds: float) -> None:
    machine, clients = Machine(*costs), [Client() for _ in range(300)]
    for number, client in enumerate(clients):
        machine.loop_of([client], start=seconds * number / len(clients))
    machine.run(0.8)
    assert not any(client.refused for client in clients)
    assert machine.scheduler.estimated_wait() > TARGET


def test_a_queue_that_stays_very_long_is_an_overload_even_if_it_does_not_grow() -> None:
    machine, clients = Machine(4e-4, 4e-4), [Client() for _ in range(1000)]
    machine.loop_of(clients)
    machine.run(1.5)
    assert any(client.refused for client in clients)
    assert max(seconds for client in clients for at, seconds in client.waited if at > 1.0) < 0.1


def test_refusals_stop_when_the_load_ends() -> None:
    machine, flood, late = Machine(4e-4, 4e-4), Client(), [Client() for _ in range(300)]
    machine.arrivals(flood, 5 * machine.capacity, 0.0, 0.5)
    machine.loop_of(late, start=1.4)
    machine.run(1.8)
    assert flood.refused
    assert not any(client.refused for client in late)


def test_client_that_honours_retry_after_gets_through() -> None:
    machine = Machine(2e-3, 2e-3)
    machine.arrivals(Client(), 2 * machine.capacity, 0.0, 8.0)
    obedient = [Client() for _ in range(20)]

    for number, client in enumerate(obedient):

        def attempt(client: Client = client) -> None:
            machine.send(client)

        def wait(retry_after: float, attempt: Callable[[], None] = attempt) -> None:
            machine.at(machine.now + math.ceil(retry_after), attempt)

        client.on_refused = wait
        machine.at(1.0 + number / 1000, attempt)
    machine.run(9.0)
    assert all(len(client.waited) == 1 for client in obedient)


def test_only_queue_and_deadlines_limit_work_without_an_overload_wait() -> None:
    machine, client = Machine(4e-4, 4e-4, overload_wait=0.0), Client()
    machine.arrivals(client, 2 * machine.capacity, 0.0, 0.5)
    machine.run(5.0)
    assert not client.refused


def test_a_stream_is_not_refused_in_an_overload() -> None:
    machine, stream = Machine(4e-4, 4e-4), Client(patient=True)
    machine.arrivals(Client(), 5 * machine.capacity, 0.0, 1.0)
    machine.arrivals(stream, 0.1 * machine.capacity, 0.0, 1.0)
    machine.run(5.0)
    assert stream.waited
    assert not stream.refused


@pytest.mark.parametrize("length", [1, 8], ids=["steps", "sequences"])
@pytest.mark.parametrize("overload_wait", [0.0, TARGET])
def test_flooding_tenant_does_not_delay_other_tenants(length: int, overload_wait: float) -> None:
    """They wait only for the running batch and their own, and none is refused."""
    machine = Machine(4e-3, 8e-5, max_queue=1000, overload_wait=overload_wait)
    calm = [Client(tenant=f"calm {number}", deadline=0.5) for number in range(20)]
    machine.loop_of(calm)
    machine.arrivals(Client(tenant="flood", length=length), 4 * machine.capacity / length, 0.1, 0.6)
    machine.run(0.6)
    assert not any(client.refused for client in calm)
    assert max(client.p99(0.2) for client in calm) <= 2.5 * (4e-3 + 256 * length * 8e-5)


def test_clients_of_a_calm_tenant_wait_for_two_batches_beside_a_flood() -> None:
    """Two batches, the running one and their own, are the least: a batch that runs cannot be interrupted.

    Clients whose steps ran together send the next ones together, so the tenant needs several rows at once.
    """
    machine, calm, chance = (
        Machine(2e-2, 1e-6, max_batch=4),
        [Client(tenant="calm") for _ in range(20)],
        random.Random(7),
    )
    for client in calm:

        def step(client: Client = client) -> None:
            machine.at(machine.now + chance.uniform(0.99, 1.01), lambda: machine.send(client))

        client.on_answer = client.on_refused = lambda _, step=step: step()  # type: ignore[misc]
        machine.at(chance.random(), lambda client=client: machine.send(client))  # type: ignore[misc]
    flood = Client(tenant="flood")
    for number in range(10_000):
        machine.at(number // 10 / 100, lambda: machine.send(flood))
    machine.run(10.0)
    waited = [each for client in calm for each in client.waited]
    assert Client(waited=waited).p99() <= 2 * 2.1e-2
    assert sum(len(client.refused) for client in calm) <= len(waited) / 100


def test_queue_is_bounded_even_if_many_tenants_share_it() -> None:
    machine = Machine(1e-3, 1e-3, max_queue=400, overload_wait=0.0)
    for number in range(50):
        machine.arrivals(Client(tenant=str(number)), 0.1 * machine.capacity, 0.0, 0.5)
    machine.run(0.5)
    assert 400 <= machine.most_in_flight <= 500
