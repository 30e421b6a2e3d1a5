"""Watch the processor load of this machine through a session, and print readings that the forecaster did not expect.

python -m unroll.examples.load                 this machine, from /proc/stat, for half a minute
python -m unroll.examples.load FILE.csv        a recording: a column `load` with values from 0 to 1, one reading per row

Needs a server for `examples/repository`, such as that of `make run`, but no torch.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from unroll.client import Client, errors

PROC_STAT = Path("/proc/stat")
#: The first readings raise no alarm: the forecaster does not know the machine yet, nor its own errors.
WARM_UP = 24
#: The alarm threshold: this factor times the mean error so far, but at least this error.
FACTOR, LEAST = 6.0, 0.1
#: The weight of a reading in the mean error.
_WEIGHT = 0.05


def main(argv: list[str]) -> int:
    """Run the example. Returns 0, or 1 without a server or without readings."""
    options = _parser().parse_args(argv)
    try:
        readings = recorded(options.file) if options.file else measured(options.seconds, options.rate)
        with Client(options.url) as client, client.session("load") as session:
            watch, number, alarms = Watch(), 0, 0
            for number, reading in enumerate(readings, 1):
                if alarm := watch.judge(reading):
                    alarms += 1
                    print(f"reading {number}: {alarm}", flush=True)
                watch.forecast = float(session.step([reading])[0])
        if number == 0:
            raise ValueError("there was no reading; give a file with rows, or more --seconds")
        print(f"{number} readings, {alarms} alarms")
    except KeyboardInterrupt:
        return 0
    except (errors.UnrollError, OSError, ValueError) as error:
        print(f"unroll.examples.load: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unroll.examples.load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.csv", help="a recording (default: this machine)")
    parser.add_argument("--seconds", type=_positive, default=30.0, help="how long to watch (default: %(default)s)")
    parser.add_argument("--rate", type=_positive, default=2.0, help="readings a second (default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    return parser


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


class Watch:
    """Compares each reading with its forecast.

    Attributes:
        forecast: the forecast of the next reading; None before the first.
    """

    def __init__(self) -> None:
        self.forecast: float | None = None
        self._judged = 0
        self._mean = 0.0  # the mean error

    def judge(self, reading: float) -> str | None:
        """Compare a reading with its forecast. Returns an alarm, or None."""
        if self.forecast is None:
            return None
        error, threshold = abs(reading - self.forecast), max(FACTOR * self._mean, LEAST)
        self._judged += 1
        judged = self._judged > WARM_UP
        # Cap an alarm's effect on the mean at the threshold, so that the next burst is detected, too.
        weight = max(_WEIGHT, 1 / self._judged)
        self._mean += weight * ((min(error, threshold) if judged else error) - self._mean)
        if judged and error > threshold:
            return f"load {reading:.0%}, forecast {self.forecast:.0%}, threshold {threshold:.0%}"
        return None


def recorded(file: Path) -> Iterator[float]:
    """Yield the readings of a CSV file. Raises ValueError for an invalid file."""
    with file.open(newline="") as text:
        rows = csv.DictReader(text)
        if "load" not in (rows.fieldnames or ()):
            raise ValueError(f"{file} has no column 'load'; its first line must name one")
        for row in rows:
            try:
                reading = float(row["load"])
            except (TypeError, ValueError):
                reading = float("nan")
            if not 0 <= reading <= 1:
                raise ValueError(f"{file}, line {rows.line_num}: load is {row['load']!r}; give a number from 0 to 1")
            yield reading


def measured(seconds: float, rate: float) -> Iterator[float]:
    """Yield the busy share of processor time between two readings."""
    before, start = processor_time(), time.monotonic()
    for number in range(1, int(seconds * rate) + 1):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        now = processor_time()
        busy, total = (after - earlier for after, earlier in zip(now, before, strict=True))
        if total > 0:  # the counters advance a hundred times a second
            yield min(1.0, max(0.0, busy / total))
            before = now


def processor_time() -> tuple[int, int]:
    """Busy and total time since the machine started. Raises ValueError if the system does not provide it."""
    try:
        counted = PROC_STAT.read_text().splitlines()[0].split()[1:9]
        user, nice, system, idle, waiting, *rest = map(int, counted)
    except (OSError, IndexError, ValueError) as error:
        raise ValueError(
            f"{PROC_STAT} cannot be read here ({error}): only Linux has it. Give a recording, FILE.csv, instead."
        ) from error
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + waiting


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
