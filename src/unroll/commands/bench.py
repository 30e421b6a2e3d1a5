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
    """Measure a model on a running server: rate, latency, and what was refused.

    Each client has a session of its own and sends random inputs. Without --rate the loop is closed: a client sends its
    next request when it has the reply. With --rate it is open: requests are due at random times, whatever the server
    does, and a latency begins when a request was due.

    Nothing is sent again, so each refusal counts. A load generator on the server's machine takes its share of the
    cores; the report says how much.
    """

    model: Annotated[str, argument("MODEL", "a model of the server: NAME or NAME:VERSION")]
    url: Url = LOCAL
    api_key: ApiKey = None
    clients: Annotated[int, option("--clients", "N", "clients, each with a session", positive)] = 16
    rate: Annotated[
        float | None, option("--rate", "N", "open loop: requests per second of all clients together", positive)
    ] = None
    steps: Annotated[
        str, option("--steps", "N,N", "time steps per request; of several, one after another", _lengths)
    ] = "1"
    over: Annotated[
        Literal["http", "stream"], option("--over", "http|stream", "one request each, or frames of a WebSocket")
    ] = "http"
    seconds: Annotated[float, option("--seconds", "S", "how long to measure, at most 600", _bounded)] = 10.0
    processes: Annotated[int, option("--processes", "N", "processes of the load generator", positive)] = 1
    seed: Annotated[int, option("--seed", "N", "seed of the inputs and of the times of an open loop")] = 0
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
