"""Servers that are up together, and take turns at being measured."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvloop

from bench import inputs
from bench.load import Client, Load, Measured
from bench.outcomes import Row
from bench.peers import Peer
from bench.raw import RawModel, raw_model
from bench.reference import Reference
from bench.servers import Server, ServerFailed, only, running
from bench.subjects import Launch, Subject, WrongAnswer, peer_launch, unroll

#: What ends a scenario, and leaves the others as they are.
FAILURES = (WrongAnswer, ServerFailed, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Turn:
    """measure: for so many seconds. check: some requests whose answers are all compared; compare: the last answers.

    All may raise one of FAILURES. at: where it stands in a curve. optional: the others go on without it.
    """

    name: str
    what: str
    measure: Callable[[float], Measured]
    check: Callable[[], None] = lambda: None
    compare: Callable[[], None] = lambda: None
    at: float | None = None
    optional: bool = False


class Servers:
    """Started when they are first asked for; all are ended together."""

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
            server = running(launch.command(folder), self._cores, log, launch.ready_path)
            self._running[launch.name] = self._stack.enter_context(server)
        return self._running[launch.name]

    def turn(self, subject: Subject, clients: int) -> Turn:
        return replace(self.turns(subject, [clients])[0], at=None)

    def turns(self, subject: Subject, counts: Sequence[int]) -> list[Turn]:
        """One for each number of clients; the first clients take part in all of them."""
        port = self.server(subject.launch).port
        clients = [subject.client(number) for number in range(max(counts))]
        found = [turn_of(subject, port, clients[:count], at=count) for count in counts]
        # At the end, those of the largest number compare for all.
        return [turn if turn.at == max(counts) else replace(turn, compare=lambda: None) for turn in found]

    def raw(self, reference: Reference, batch: int, steps: int = 1) -> Turn:
        """onnxruntime alone."""
        if reference.path not in self._raw:
            self._raw[reference.path] = self._stack.enter_context(raw_model(reference.path, self._cores))
        model = self._raw[reference.path]
        what = f"onnxruntime alone, batch {batch}" + (f", {steps} time steps" if steps > 1 else "")
        name = f"raw-{batch}" if steps == 1 else f"raw-{batch}x{steps}"
        return Turn(name, what, lambda seconds: _alone((), lambda: model.measure(batch, steps, seconds)))


def turn_of(
    subject: Subject,
    port: int,
    clients: Sequence[Client],
    at: float | None = None,
    rate: float | None = None,
    *,
    beside: Sequence[int] = (),
) -> Turn:
    """rate: requests a second of an open loop. beside: ports of further servers that it needs."""

    async def check() -> None:
        async with Load(port, clients) as load:
            for _ in range(inputs.ROWS):
                raise_on_errors(subject.name, await load.once())
                compare()

    async def measure(seconds: float) -> Measured:
        async with Load(port, clients) as load:
            raise_on_errors(subject.name, await load.once())  # every connection is accepted before the clock runs
            return raise_on_errors(subject.name, await load.run(seconds, rate))

    def compare() -> None:
        for client in clients:
            subject.check(client)

    return Turn(
        subject.name,
        subject.what,
        lambda seconds: _alone((port, *beside), lambda: uvloop.run(measure(seconds))),
        lambda: uvloop.run(check()),
        compare,
        at,
        subject.optional,
    )


def _alone(ports: Sequence[int], measure: Callable[[], Measured]) -> Measured:
    with only(*ports):
        return measure()


def raise_on_errors(name: str, measured: Measured) -> Measured:
    if measured.errors:
        raise WrongAnswer(f"{name}: {measured.errors} replies were not 200, first {measured.first_error}")
    return measured


@dataclass(frozen=True, slots=True)
class Bench:
    """seconds: of one turn. repeats: turns of each. models: by name, in the repository. peers: and their interpreters.

    quick: the figures say nothing, only that everything works. failures: of peers, which do not stop the others.
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

    @property
    def judged(self) -> bool:
        return not self.quick

    @contextmanager
    def servers(self, cores: Collection[int] | None = None) -> Iterator[Servers]:
        """cores: of the servers; by default one."""
        with ExitStack() as stack:
            yield Servers(self.folder, cores or {self.server_core}, stack)

    def unroll(self, *options: str, name: str = "unroll") -> Launch:
        return unroll(self.repository, *options, name=name)

    def of_peers(self, servers: Servers, make: Callable[[Peer, Launch], Subject | None]) -> Iterator[Subject]:
        """One of each peer that starts and offers it."""
        models = {name: reference.path for name, reference in self.models.items()}
        for peer, python in self.peers.values():
            launch = peer_launch(peer, python, models)
            subject = make(peer, launch)
            if subject is not None and self._succeeds(peer.name, lambda launch=launch: servers.server(launch)):
                yield subject

    def alternate(self, turns: Sequence[Turn], repeats: int | None = None) -> list[Row]:
        """Each turn's answers are checked, then all are measured in turn, then the last answers are compared."""
        measured: dict[Turn, list[Measured]] = {turn: [] for turn in turns}

        def each(step: Callable[[Turn], object]) -> None:
            for turn in [*measured]:
                if not turn.optional:
                    step(turn)
                elif not self._succeeds(turn.name, lambda turn=turn: step(turn)):
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
