"""The measured parts do real work, and the fastest run is reported."""

import json
from pathlib import Path

import pytest

from bench.internals.micro import Part, Turns, main, measure, protocol

REPOSITORY = Path(__file__).parents[3] / "examples" / "repository"


class Machine:
    """A part that takes 10 µs for 4 steps, but 5 ms at every 3000th call."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def call(self) -> None:
        self.calls += 1
        self.seconds += 5e-3 if self.calls % 3000 == 0 else 10e-6


def test_lowest_of_many_runs_counts() -> None:
    machine = Machine()
    figure = measure(Part("p", 4, machine.call), 0.1, lambda: machine.seconds)
    assert figure.least == pytest.approx(2500)
    assert figure.least <= figure.median
    assert figure.runs >= 5
    assert machine.seconds < 1.0


def test_slow_part_still_runs_a_few_times() -> None:
    machine = Machine()

    def call() -> None:
        machine.calls += 1
        machine.seconds += 1.0

    assert measure(Part("p", 1, call), 0.1, lambda: machine.seconds).least == pytest.approx(1e9)
    assert machine.calls < 10


@pytest.mark.parametrize("sessions", [1, 16, 256])
def test_every_scheduler_turn_answers_every_session(sessions: int) -> None:
    turns = Turns(sessions)
    for taken in range(1, 4):
        turns.step_as_chunks()
        assert turns.answered == 2 * taken * sessions - sessions
        turns.step_as_group()
        assert turns.answered == 2 * taken * sessions
    assert turns.scheduler.in_flight == 0
    turns.scheduler.check_invariants()


def test_parts_of_the_protocol_take_their_inputs() -> None:
    names = [part.name for part in protocol()]
    assert len(set(names)) == len(names)
    for part in protocol():
        part.call()


def test_command_prints_a_table_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    assert main(["--seconds", "0.001", "--repository", str(REPOSITORY), "--json", str(target)]) == 0
    figures, printed = json.loads(target.read_text()), capsys.readouterr().out
    assert len(figures) > 30
    for figure in figures:
        assert figure["name"] in printed
        assert 0 < figure["least"] <= figure["median"]
    assert {"protocol", "scheduler", "co2"} <= {figure["name"].partition(":")[0] for figure in figures}


def test_unknown_part_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repository", str(REPOSITORY), "--only", "no-such-part"]) == 2
    assert "no-such-part" in capsys.readouterr().err
