"""Steps per second over HTTP: Unroll, a naive server, a bare echo, and the load generator's own limit, in one run.

Server on one core, load generator on another; the servers take turns, several times over, and medians are reported.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import uvloop

from bench import report
from bench.load import Client, Load, Measured
from bench.reference import Reference
from bench.servers import ServerFailed, on_core, running
from bench.subjects import FEATURES, MODEL, Subject, subjects

#: Different requests of one client.
_REQUESTS = 16
#: Part of a measurement's time that is spent before it, and not counted.
_WARM_UP = 0.2
_EXPORT_SECONDS = 300


class BenchFailed(Exception):
    """A server answered wrongly, or not with status 200: its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A subject, where it listens, and its clients, which go on where they were in each of its turns."""

    subject: Subject
    port: int
    clients: list[Client]

    async def check(self, reference: Reference) -> None:
        """All clients at once, one request each, each reply compared; so the model's batches are mixed."""
        async with Load(self.port, self.clients) as load:
            for _ in range(_REQUESTS):
                _raise_on_errors(self.subject, await load.once())
                self.compare(reference)

    def compare(self, reference: Reference) -> None:
        """Each client's last reply must be, bit for bit, what the model says after all that this client sent."""
        if not self.subject.stateful:
            return
        for number, client in enumerate(self.clients):
            expected = reference.outputs(number, client.answered)[-1]
            if not np.array_equal(self.subject.outputs(client.last), expected):
                raise BenchFailed(f"{self.subject.name}: client {number} got a wrong answer to step {client.answered}")

    async def measure(self, seconds: float) -> Measured:
        async with Load(self.port, self.clients) as load:
            await load.once()  # every connection is accepted before the clock runs
            return await load.run(seconds, seconds * _WARM_UP)


def _raise_on_errors(subject: Subject, measured: Measured) -> None:
    if measured.errors:
        raise BenchFailed(f"{subject.name}: {measured.errors} replies were not 200, first {measured.first_error}")


def measure(turns: Sequence[Turn], reference: Reference, arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """The runs of each subject, by name. Raises BenchFailed."""
    measured: dict[str, list[Measured]] = {turn.subject.name: [] for turn in turns}
    for turn in turns:
        uvloop.run(turn.check(reference))
    for _ in range(arguments.repeats):
        for turn in turns:
            run = uvloop.run(turn.measure(arguments.seconds))
            _raise_on_errors(turn.subject, run)
            measured[turn.subject.name].append(run)
    for turn in turns:
        turn.compare(reference)
    return measured


def run(arguments: argparse.Namespace, folder: Path, server_core: int) -> dict[str, dict[str, object]]:
    repository = folder / "repository"
    subprocess.run([sys.executable, "-m", "bench.model", str(repository)], check=True, timeout=_EXPORT_SECONDS)
    shape = (arguments.clients, _REQUESTS, FEATURES)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    reference = Reference(repository / MODEL / "1" / "model.onnx", values)
    with ExitStack() as servers:
        turns: list[Turn] = []
        ports: dict[tuple[str, ...], int] = {}
        for subject in subjects(repository, json_bodies=arguments.json_bodies):
            if subject.command not in ports:
                log = folder / f"{subject.name}.log"
                ports[subject.command] = servers.enter_context(running(subject.command, server_core, log))
            port = ports[subject.command]
            subject.open_all(port, arguments.clients)
            clients = [Client(subject.requests(number, values[number])) for number in range(arguments.clients)]
            turns.append(Turn(subject, port, clients))
        measured = measure(turns, reference, arguments)
    return report.summary([turn.subject for turn in turns], measured)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    about = report.machine()
    cores = about["cores"]
    remarks = report.remarks(about)
    print(
        f"{arguments.clients} clients, {arguments.repeats} × {arguments.seconds:g} s each; "
        f"server on core {cores[0]}, load generator on core {cores[-1]} of {about['cpu']}"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, on_core(cores[-1]):
            results = run(arguments, Path(folder), cores[0])
    except (BenchFailed, ServerFailed, ConnectionError, TimeoutError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the servers are stopped", file=sys.stderr)
        return 130
    print(report.table(results), *(f"Note: {remark}" for remark in remarks), sep="\n")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**about, "settings": _settings(arguments), "remarks": remarks, "results": results}, indent=2)
            + "\n"
        )
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C: the event loop, while it runs, knows what to do with that."""
    signal.raise_signal(signal.SIGINT)


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(arguments).items() if name != "json"}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.steps", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement, at most 60")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each server, at most 100")
    parser.add_argument("--clients", type=int, default=64, help="concurrent clients, at most 1024")
    parser.add_argument("--json-bodies", action="store_true", help="measure Unroll with JSON bodies, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    if not (0 < arguments.seconds <= 60 and 0 < arguments.repeats <= 100 and 0 < arguments.clients <= 1024):
        parser.error("out of bounds, see --help")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
