"""Results: rows of figures, the targets they are compared with, and rows limited by the load generator."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.load import Measurement

#: Above this share of its ceiling or core, the load generator limits the figures.
LOAD_BOUND = 0.85
#: Milliseconds by which requests of an open loop may leave late.
_LATE = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """A subject's turns and their medians; `at` is the position on a curve's x axis."""

    name: str
    what: str
    turns: Sequence[Measurement]
    at: float | None = None

    @property
    def rates(self) -> list[float]:
        return [turn.rate for turn in self.turns]

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def p50(self) -> float:
        return median(turn.p50 for turn in self.turns)

    @property
    def p99(self) -> float:
        return median(turn.p99 for turn in self.turns)

    def is_load_bound(self, ceiling: float | None) -> bool:
        """Was the load generator the limit? `ceiling` is its rate with canned replies."""
        late = median(turn.late for turn in self.turns)
        if late:
            return late > _LATE
        busy = median(turn.busy for turn in self.turns)
        if not busy:  # measured without the load generator
            return False
        return busy > LOAD_BOUND or (ceiling is not None and self.rate > LOAD_BOUND * ceiling)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and the value reached.

    Attributes:
        number: the row in the table of targets.
        value: the value reached; None if it was not measured.
        low, high: the lowest and highest value of a turn.
    """

    number: int
    says: str
    bound: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    at_least: bool = True
    unit: str = ""

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(frozen=True, slots=True)
class Outcome:
    """A scenario's figures; `unit` is that of the rates, `failed` is the reason if there are none."""

    name: str
    title: str
    unit: str = ""
    rows: Sequence[Row] = ()
    verdicts: Sequence[Verdict] = ()
    remarks: Sequence[str] = field(default_factory=list)
    failed: str = ""

    def document(self, *, judged: bool = True) -> dict[str, Any]:
        """The JSON document: medians, all turns, and verdicts; these only if the figures are meaningful (`judged`)."""
        ceiling = next((row.rate for row in self.rows if row.name == "ceiling"), None)
        rows = [
            {
                "name": row.name,
                "what": row.what,
                "at": row.at,
                "rate": row.rate,
                "p50_ms": row.p50,
                "p99_ms": row.p99,
                "load_bound": row.name != "ceiling" and row.is_load_bound(ceiling),
                "turns": [asdict(turn) for turn in row.turns],
            }
            for row in self.rows
        ]
        verdicts = [{**asdict(verdict), "passed": verdict.passed if judged else None} for verdict in self.verdicts]
        return {
            "title": self.title,
            "unit": self.unit,
            "rows": rows,
            "verdicts": verdicts,
            "remarks": [*self.remarks],
            "failed": self.failed,
        }


def ratio(number: int, says: str, bound: float, row: Row, other: Row | None) -> Verdict:
    """The rate of `row` relative to that of `other`; low and high turn by turn."""
    if other is None or not all(other.rates):
        return Verdict(number, says, bound, unit="×")
    each = [rate / other_rate for rate, other_rate in zip(row.rates, other.rates, strict=True)]
    return Verdict(number, says, bound, row.rate / other.rate, min(each), max(each), unit="×")


def at_most(number: int, says: str, bound: float, value: float, each: Sequence[float], unit: str) -> Verdict:
    """A value that must not exceed `bound`, from the values of each turn."""
    return Verdict(number, says, bound, value, min(each), max(each), at_least=False, unit=unit)


def fastest(rows: Mapping[str, Row], prefix: str) -> Row | None:
    """The fastest row of a server that is measured in several configurations."""
    found = [row for name, row in rows.items() if name.startswith(prefix)]
    return max(found, key=lambda row: row.rate, default=None)
