"""`unroll demo`: stream 43 years of weekly CO₂ measurements through one session and compare with PyTorch.

PyTorch is not needed: `expected.safetensors` holds its forecasts.
"""

import contextlib
import io
import json
import secrets
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from unroll.client import Client, Session, errors
from unroll.examples.display import Display, display
from unroll.models import mauna_loa
from unroll.models.mauna_loa import Series

MODEL = "co2"
EXAMPLE = Path(__file__).parent / "co2"

#: The forecaster was trained on the years up to this one.
LAST_TRAINING_YEAR = 1990
#: Seconds to wait for a restarting server.
_PATIENCE = 60.0
#: With --quick, only these last weeks are sent one by one; the earlier ones go in one request.
QUICK_WEEKS = 520


class DemoFailed(Exception):
    """The example's files are incomplete, or the server's answers are wrong."""


class Server(Protocol):
    """A server that the demo may kill; its sessions must survive."""

    @property
    def pid(self) -> int: ...
    def kill(self) -> None: ...
    def start(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Example:
    """The measurements, and PyTorch's forecasts for them; forecasts[i] is for week i + 1."""

    series: Series
    float32: np.ndarray  # (weeks,)
    float64: np.ndarray  # (weeks,)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the example from its folder. Raises DemoFailed."""
        try:
            series = mauna_loa.read(folder / "co2.csv")
            expected = load((folder / "expected.safetensors").read_bytes())
            inputs, single, double = (expected[name][:, 0] for name in ("input", "float32", "float64"))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise DemoFailed(f"{folder} is not a folder of the example: {error}") from error
        if not np.array_equal(inputs, series.ppm):
            raise DemoFailed(f"{folder}: expected.safetensors does not match co2.csv")
        return cls(series, single, double)

    @property
    def rounding(self) -> float:
        """The largest difference between PyTorch's float32 and float64, in ppm."""
        return float(np.abs(self.float32 - self.float64).max())

    @property
    def unit(self) -> float:
        """The float32 spacing at the largest measurement, in ppm."""
        return float(np.spacing(self.series.ppm.max()))

    @property
    def tolerance(self) -> float:
        """The same tolerance as in export: four times PyTorch's own rounding, plus a floor for the output's scale."""
        return 4 * self.rounding + self.unit

    def judged(self) -> np.ndarray:
        """The weeks to score: held out from training, and measured like the week before."""
        measured = ~self.series.interpolated
        held_out = np.array([day.year > LAST_TRAINING_YEAR for day in self.series.dates])
        return np.flatnonzero(held_out[1:] & measured[1:] & measured[:-1]) + 1


@dataclass(frozen=True, slots=True)
class Streamed:
    """The server's forecasts. `singles` requests of one week each took `seconds`."""

    forecasts: np.ndarray  # (weeks,) float32
    singles: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of the comparisons. Errors and differences are in ppm.

    Attributes:
        judged_weeks: The number of scored weeks, all measured and held out from training.
        persistence_error: The error of forecasting "same as this week".
        differences: The largest difference in each comparison that must be equal, by name; 0 if every bit is equal.
        faults: Descriptions of all failures.
    """

    weeks: int
    single_steps: int
    seconds: float
    judged_weeks: int
    mean_absolute_error: float
    persistence_error: float
    float64_difference: float
    float32_difference: float
    tolerance: float
    differences: dict[str, float]
    faults: list[str]


def run(
    url: str, example: Path = EXAMPLE, server: Server | None = None, *, quick: bool = False, as_json: bool = False
) -> int:
    """Run the demo. Returns 0 if the served forecasts equal PyTorch's; otherwise prints the reason and returns 1.

    Args:
        url: The server's URL.
        example: The folder with co2.csv and expected.safetensors.
        server: If given, the server at `url`, to kill and restart halfway.
        quick: Send only the last weeks one by one.
        as_json: Print one JSON document, and everything else on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # without Unicode, show ? for the bars
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            known = Example.read(example)
            found = _measure(url, known, server, quick=quick)
            print(report(known, found))
    except (DemoFailed, errors.UnrollError) as error:
        print(f"unroll demo: {error}", file=sys.stderr)
        return 1
    for fault in found.faults:
        print(f"unroll demo: {fault}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    elif not found.faults:
        print(f"""
To try it by hand: open a session, send two weeks, read its position; send the same weeks as a whole sequence; save
the session's state to a file and open a new session from it; read the model's Open Inference metadata.

{commands(url)}""")
    return 1 if found.faults else 0


def _measure(url: str, example: Example, server: Server | None, *, quick: bool) -> Findings:
    """Stream and compare. Raises DemoFailed or UnrollError."""
    with Client(url, retry_for=_PATIENCE if server else 2.0) as client:
        exact = _check_server(client)
        with client.session(MODEL) as session:
            streamed = stream(session, example, server, quick=quick)
            _retry(session, example.series.ppm, streamed.forecasts)
        series = example.series.ppm[:, np.newaxis]
        same = {"Streamed = whole": client.sequences(MODEL, [series])[0]}
        if server:
            with client.session(MODEL) as uninterrupted:
                same["Killed = never killed"] = uninterrupted.steps(series)
    return compare(example, streamed, {name: outputs[:, 0] for name, outputs in same.items()}, exact=exact)


def _check_server(client: Client) -> bool:
    """Whether every bit must be independent of chunking. Raises DemoFailed without a server that has the model."""
    try:
        model = client.model(MODEL).description
    except errors.ConnectionFailed as error:
        hint = "start one with `make run`, or `unroll serve --repository examples/repository`"
        raise DemoFailed(f"{error}\n{hint}") from error
    except errors.ModelUnknown as error:
        hint = f"the demo needs the model {MODEL!r}: unroll serve --repository examples/repository"
        raise DemoFailed(f"{error}\n{hint}") from error
    return bool(model["bit_exact"] and model["provider"] == "CPUExecutionProvider")


def stream(session: Session, example: Example, server: Server | None = None, *, quick: bool = False) -> Streamed:
    """Send the whole series through one session, one week per request."""
    ppm = example.series.ppm
    forecasts = np.empty(len(ppm), np.float32)
    head = max(0, len(ppm) - QUICK_WEEKS) if quick else 0
    if head:
        forecasts[:head] = session.steps(ppm[:head, np.newaxis])[:, 0]
    print(
        f"CO₂ at Mauna Loa, week by week from {example.series.dates[head]}; each forecast was made the week before.\n"
    )
    shown = display(sys.stdout, example.series.dates, ppm, head)
    started, away = time.perf_counter(), 0.0
    for week in range(head, len(ppm)):
        if week:
            shown.show(week, forecasts)
        if server and week == (head + len(ppm)) // 2:
            away = _crash(server, session, ppm[: week + 1], forecasts, shown)
        else:
            forecasts[week] = session.step(ppm[week : week + 1])[0]
    return Streamed(forecasts, len(ppm) - head, time.perf_counter() - started - away)


def _crash(server: Server, session: Session, ppm: np.ndarray, forecasts: np.ndarray, shown: Display) -> float:
    """Kill the server before the last week of `ppm`, and restart it while the client retries. Returns the seconds."""
    began, killed, week = time.perf_counter(), server.pid, len(ppm) - 1
    server.kill()
    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(server.start)
        forecasts[week] = session.step(ppm[week:])[0]
        starting.result()
    seconds = time.perf_counter() - began
    _retry(session, ppm, forecasts)
    shown.note(f"""
  Half way: the server, process {killed}, is killed (kill -9) after {week} steps, and started again.
    The client's next step is answered after {seconds:.1f} s, by process {server.pid}, which has the session from disk.
    The client sends step {week} again, as if its answer had been lost: same answer, not applied twice. It goes on.
""")
    return time.perf_counter() - began


def _retry(session: Session, ppm: np.ndarray, forecasts: np.ndarray) -> None:
    """Send the last step again, like a client that lost the reply. Raises DemoFailed if it is applied twice."""
    weeks = len(ppm)
    again = session.step(ppm[-1:], position=weeks - 1)
    if again[0] != forecasts[weeks - 1] or session.refresh() != weeks:
        raise DemoFailed(f"a retried step got another reply than the first time (position {session.position})")


def compare(example: Example, streamed: Streamed, same: Mapping[str, np.ndarray], *, exact: bool) -> Findings:
    """Compare the forecasts with measurements, with PyTorch's, and with each other.

    Args:
        example: The measurements, and PyTorch's forecasts.
        streamed: The served forecasts.
        same: Forecasts that must equal the streamed ones, by the name of the comparison.
        exact: Whether they must be equal in every bit, rather than within the tolerance.
    """
    ppm, served, judged = example.series.ppm.astype(np.float64), streamed.forecasts, example.judged()
    single, double = (float(np.abs(served - torch).max()) for torch in (example.float32, example.float64))
    apart = {name: float(np.abs(served - others).max()) for name, others in same.items()}
    faults = [
        f"{name}: the forecasts differ by {difference:.1e} ppm"
        for name, difference in apart.items()
        if not difference <= (0 if exact else example.tolerance)
    ]
    if not double <= example.tolerance:
        faults.append(f"the served forecasts differ from PyTorch by {double:.1e} ppm, beyond {example.tolerance:.1e}")
    return Findings(
        weeks=len(ppm),
        single_steps=streamed.singles,
        seconds=streamed.seconds,
        judged_weeks=len(judged),
        mean_absolute_error=float(np.abs(served[judged - 1] - ppm[judged]).mean()),
        persistence_error=float(np.abs(ppm[judged - 1] - ppm[judged]).mean()),
        float64_difference=double,
        float32_difference=single,
        tolerance=example.tolerance,
        differences=apart,
        faults=faults,
    )


def report(example: Example, found: Findings) -> str:
    equal = [
        f"{name:26}{f'differs by {apart:.1e} ppm' if apart else 'yes, bit for bit'}"
        for name, apart in found.differences.items()
    ]
    return f"""
{found.weeks} weeks through one session, {found.single_steps} of them one request each: {found.seconds:.2f} s, \
{found.single_steps / found.seconds:.0f} steps/s on one connection

Forecast one week ahead, {found.judged_weeks} measured weeks after {LAST_TRAINING_YEAR}, none of them trained on
  mean absolute error     {found.mean_absolute_error:.3f} ppm; saying "as this week" {found.persistence_error:.3f} ppm
Against PyTorch, all {found.weeks} weeks
  max |served - float64|  {found.float64_difference:.1e} ppm; tolerance {found.tolerance:.1e}: \
4 x PyTorch float32's own {example.rounding:.1e}, and one float32 unit {example.unit:.1e}
  max |served - float32|  {found.float32_difference:.1e} ppm
Last step sent twice      same answer, applied once
""" + "\n".join(equal)


def commands(url: str) -> str:
    """Shell commands that show the API, with a fresh session id on each call so that they can be repeated."""
    session, post = f"try-{secrets.token_hex(2)}", "curl -sw '\\n' -H 'content-type: application/json'"
    model = f"{url}/v1/models/{MODEL}"
    # No comments between the lines: an interactive zsh runs them as commands.
    return f"""\
{post} {model}/sessions -d '{{"session_id": "{session}"}}'
{post} {model}/sessions/{session}/steps -d '{{"inputs": [[371.2], [371.5]], "position": 0}}'
curl -sw '\\n' {model}/sessions/{session}
{post} {model}/sequences -d '{{"inputs": [[[371.2], [371.5]]]}}'
curl -s {model}/sessions/{session}/state -o /tmp/co2.state
curl -sw '\\n' -H 'content-type: application/octet-stream' {model}/sessions --data-binary @/tmp/co2.state
curl -sw '\\n' {url}/v2/models/{MODEL}"""
