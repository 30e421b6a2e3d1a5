"""The cost of several workers that share a store, as processor time, which is insensitive to other load.

The workers have all cores, and the load generator shares one, so the wall-clock rate is meaningless; steps per second
of processor time are not.
"""

from dataclasses import replace

from bench.durability import stored
from bench.load import WARM_UP, Measurement
from bench.outcomes import Outcome, ratio
from bench.servers import Server
from bench.steps import CLIENTS
from bench.turns import Bench, Turn

_WORKERS = (1, 2, 4)
#: The target for steps per second of processor time, as a share of those with one worker.
_BOUND = 0.85


def workers(bench: Bench) -> list[Outcome]:
    """1, 2 and 4 workers over one folder: with as many clients for each, and with the clients of one."""
    reference = bench.models["small"]
    turns, judged = [], []
    with bench.servers(bench.cores) as servers:
        for number in _WORKERS:
            name = f"unroll-{number}"
            # The timeout: a busy disk costs no processor.
            options = (f"--store=file://{bench.folder}/{name}", "--store-timeout=30", f"--workers={number}")
            launch = bench.unroll(*options, name=name)
            subject = stored(launch, reference, f"in a folder, workers: {number}")
            counts = sorted({CLIENTS, CLIENTS * number})
            turns += [_by_processor(turn, servers.server(launch)) for turn in servers.turns(subject, counts)]
            judged.append(len(turns) - 1)
        rows = bench.alternate(turns)
    one, *more = (rows[i] for i in judged)
    says = f"HTTP, raw bytes, sessions in a folder, {CLIENTS} clients a worker, steps per second of processor"
    verdicts = [ratio(14, f"{says}: {row.name} of one", _BOUND, row, one) for row in more]
    title = "Workers over one folder, by the number of HTTP clients, a step a request, LSTM 2×64"
    return [Outcome("workers", title, "steps/s of processor", rows, verdicts)]


def _by_processor(turn: Turn, server: Server) -> Turn:
    """The turn, with the rate per second of the server's processor time."""

    def measure(seconds: float) -> Measurement:
        before = server.cpu_seconds()
        measured = turn.measure(seconds)
        steps = measured.rate * seconds * (1 + WARM_UP)
        return replace(measured, rate=steps / (server.cpu_seconds() - before))

    return replace(turn, measure=measure)
