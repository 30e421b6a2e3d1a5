"""`unroll bench`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from unroll.commands.options import LOCAL, ApiKey, Failed, Json, Url, WrongOption, argument, option, positive

_MOST_SECONDS = 600.0


def _lengths(words: str) -> None:
    if not all(word.isdecimal() and int(word) for word in words.split(",")):
        raise ValueError(f"{words!r} is not a list of numbers above 0, such as 1 or 1,16,64")


def _bounded(seconds: float) -> None:
    if not 0 < seconds <= _MOST_SECONDS:
        raise ValueError(f"give a number above 0, at most {_MOST_SECONDS:.0f}")


@dataclass(frozen=True)
class Bench:
    """Benchmark a model on a running server: rate, latency and refusals.

    Each client has its own session and sends random inputs. Without --rate the loop is closed: a client sends its next
    request once it has the reply. With --rate the loop is open: requests are due at random times, independent of the
    server, and latency is measured from the time a request was due.

    Requests are not retried, so every refusal counts. A load generator on the server's machine competes for its cores;
    the report says how many it used.
    """

    model: Annotated[str, argument("MODEL", "a model of the server: NAME or NAME:VERSION")]
    url: Url = LOCAL
    api_key: ApiKey = None
    clients: Annotated[int, option("--clients", "N", "clients, each with a session", positive)] = 16
    rate: Annotated[
        float | None, option("--rate", "N", "open loop: total requests per second of all clients", positive)
    ] = None
    steps: Annotated[str, option("--steps", "N,N", "time steps per request; several numbers take turns", _lengths)] = (
        "1"
    )
    over: Annotated[
        Literal["http", "stream"], option("--over", "http|stream", "HTTP requests, or frames of a WebSocket")
    ] = "http"
    seconds: Annotated[float, option("--seconds", "S", "duration of the measurement, at most 600", _bounded)] = 10.0
    processes: Annotated[int, option("--processes", "N", "processes of the load generator", positive)] = 1
    seed: Annotated[int, option("--seed", "N", "seed of the inputs, and of the request times of an open loop")] = 0
    json: Json = False

    def run(self) -> int:
        if self.processes > self.clients:
            raise WrongOption(f"{self.processes} processes need as many clients: add --clients {self.processes}")
        from unroll.client import load
        from unroll.client.errors import UnrollError

        plan = load.Plan(
            url=self.url,
            api_key=self.api_key,
            model=self.model,
            clients=self.clients,
            rate=self.rate,
            lengths=tuple(map(int, self.steps.split(","))),
            over=self.over,
            seconds=self.seconds,
            seed=self.seed,
        )
        try:
            measured = load.measure(plan, self.processes)
        except UnrollError as error:
            raise Failed(str(error)) from error
        print(load.document(plan, measured) if self.json else load.report(plan, measured, self.processes))
        return int(not measured.accepted)
