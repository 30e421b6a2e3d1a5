"""Runs servers at the same time, and measures them in turns."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import uvloop

from bench import inputs
from bench.load import Client, Load, Measurement
from bench.outcomes import Row
from bench.peers import Peer
from bench.raw import RawModel, raw_model
from bench.reference import Reference
from bench.servers import Server, ServerFailed, running_server, suspended
from bench.subjects import Launch, Subject, WrongAnswer, peer_launch, unroll

#: Errors that end one scenario; the other scenarios still run.
FAILURES = (WrongAnswer, ServerFailed, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing to measure. Every callable may raise one of FAILURES.

    Attributes:
        measure: runs for the given seconds.
        check: sends some requests and compares every answer.
        compare: compares the last answers.
        at: the position on a curve's x axis.
        optional: whether measurements continue if this turn fails.
    """

    name: str
    what: str
    measure: Callable[[float], Measurement]
    check: Callable[[], object] = lambda: None
    compare: Callable[[], object] = lambda: None
    at: float | None = None
    optional: bool = False


class Servers:
    """Starts each server at its first use, and ends all together."""

    def __init__(self, folder: Path, cores: Collection[int], stack: ExitStack) -> None:
        self._folder = folder
        self._cores = cores
        self._stack = stack
        self._running: dict[str, Server] = {}
        self._raw: dict[Path, RawModel] = {}

    def server(self, launch: Launch) -> Server:
        if launch.name not in self._running:
            folder = self._folder / f"{launch.name}-{len(list(self._folder.iterdir()))}"
            folder.mkdir()
            log = folder.with_suffix(".log")
            server = running_server(launch.command(folder), self._cores, log, launch.ready_path)
            self._running[launch.name] = self._stack.enter_context(server)
        return self._running[launch.name]

    def turn(self, subject: Subject, clients: int) -> Turn:
        return replace(self.turns(subject, [clients])[0], at=None)

    def turns(self, subject: Subject, counts: Sequence[int]) -> list[Turn]:
        """One turn for each number of clients; the first clients take part in every turn."""
        port = self.server(subject.launch).port
        clients = [subject.client(number) for number in range(max(counts))]
        found = [self.load_turn(subject, port, clients[:count], at=count) for count in counts]
        # The turn with the most clients compares the last answers of all.
        return [turn if turn.at == max(counts) else replace(turn, compare=lambda: None) for turn in found]

    def raw(self, reference: Reference, batch: int, steps: int = 1) -> Turn:
        """A turn of bare onnxruntime."""
        if reference.path not in self._raw:
            self._raw[reference.path] = self._stack.enter_context(raw_model(reference.path, self._cores))
        model = self._raw[reference.path]
        what = f"onnxruntime alone, batch {batch}" + (f", {steps} time steps" if steps > 1 else "")
        name = f"raw-{batch}" if steps == 1 else f"raw-{batch}x{steps}"
        return Turn(name, what, lambda seconds: self._measure_alone((), lambda: model.measure(batch, steps, seconds)))

    def load_turn(
        self,
        subject: Subject,
        port: int,
        clients: Sequence[Client],
        at: float | None = None,
        rate: float | None = None,
        *,
        other_ports: Sequence[int] = (),
    ) -> Turn:
        """A turn of these clients, in an open loop if `rate` is given; `other_ports` are those of further servers."""

        async def check() -> None:
            async with Load(port, clients) as load:
                for _ in range(inputs.ROWS):
                    require_no_errors(subject.name, await load.run_once())
                    compare()

        async def measure(seconds: float) -> Measurement:
            async with Load(port, clients) as load:
                # Every connection is accepted before the clock runs.
                require_no_errors(subject.name, await load.run_once())
                return require_no_errors(subject.name, await load.run(seconds, rate))

        def compare() -> None:
            for client in clients:
                subject.check(client)

        return Turn(
            subject.name,
            subject.what,
            lambda seconds: self._measure_alone((port, *other_ports), lambda: uvloop.run(measure(seconds))),
            lambda: uvloop.run(check()),
            compare,
            at,
            subject.optional,
        )

    def _measure_alone(self, ports: Sequence[int], measure: Callable[[], Measurement]) -> Measurement:
        """Measure while the servers on other ports are suspended."""
        with suspended(server for server in self._running.values() if server.port not in ports):
            return measure()


def require_no_errors(name: str, measured: Measurement) -> Measurement:
    if measured.errors:
        raise WrongAnswer(f"{name}: {measured.errors} replies were not 200, first {measured.first_error}")
    return measured


@dataclass(frozen=True, slots=True)
class Bench:
    """The context of all scenarios.

    Attributes:
        seconds: the length of a turn.
        repeats: the number of turns of each subject.
        quick: whether this is a functional test with meaningless figures.
        models: the models in the repository, by name.
        peers: the peers with their interpreters.
        failures: failures of peers, which do not stop the measurements.
    """

    folder: Path
    seconds: float
    repeats: int
    quick: bool
    server_core: int
    cores: Collection[int]
    repository: Path
    models: Mapping[str, Reference]
    peers: Mapping[str, tuple[Peer, Path]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def servers(self, cores: Collection[int] | None = None) -> Iterator[Servers]:
        """Turns of servers on `cores`; one core by default."""
        with ExitStack() as stack:
            yield Servers(self.folder, cores or {self.server_core}, stack)

    def unroll(self, *options: str, name: str = "unroll") -> Launch:
        return unroll(self.repository, *options, name=name)

    def peer_subjects(self, servers: Servers, make: Callable[[Peer, Launch], Subject | None]) -> Iterator[Subject]:
        """One subject for each peer that starts and supports it."""
        models = {name: reference.path for name, reference in self.models.items()}
        for peer, python in self.peers.values():
            launch = peer_launch(peer, python, models)
            subject = make(peer, launch)
            if subject is not None and self._succeeds(peer.name, partial(servers.server, launch)):
                yield subject

    def alternate(self, turns: Sequence[Turn], repeats: int | None = None) -> list[Row]:
        """Check each turn's answers, measure all turns alternately, then compare the last answers."""
        measured: dict[Turn, list[Measurement]] = {turn: [] for turn in turns}

        def each(step: Callable[[Turn], object]) -> None:
            for turn in [*measured]:
                if not turn.optional:
                    step(turn)
                elif not self._succeeds(turn.name, partial(step, turn)):
                    del measured[turn]

        each(lambda turn: turn.check())
        for _ in range(repeats or self.repeats):
            each(lambda turn: measured[turn].append(turn.measure(self.seconds)))
        each(lambda turn: turn.compare())
        return [Row(turn.name, turn.what, runs, turn.at) for turn, runs in measured.items()]

    def _succeeds(self, name: str, attempt: Callable[[], object]) -> bool:
        try:
            attempt()
        except FAILURES as error:
            self.failures.append(f"{name} failed and was left out: {type(error).__name__}: {error}")
            return False
        return True


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}
