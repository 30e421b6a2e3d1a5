"""The cost curve, on synthetic models without a clock: each call returns its duration."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given

from unroll.service.core.clock import ManualClock
from unroll.service.engine.curve import Curve, measure

Cost = Callable[[int, int], float]


def straight(rows: int, steps: int) -> float:
    """Like a small LSTM: 40 µs per call, 2 µs per row and step."""
    return 40e-6 + 2e-6 * rows * steps


def with_a_step(rows: int, steps: int) -> float:
    """Beyond 64 rows, each row costs three times as much."""
    return straight(rows, steps) * (3 if rows > 64 else 1)


class Machine:
    """Calls with the duration `cost`. `slow`: numbers, from 0, of calls made ten times slower by a disturbance."""

    def __init__(self, cost: Cost, slow: Callable[[int], bool] = lambda call: False) -> None:
        self.calls: list[tuple[int, int]] = []
        self._cost = cost
        self._slow = slow
        self._clock = ManualClock()

    def run(self, rows: int, steps: int) -> None:
        self._clock.advance(self._cost(rows, steps) * (10 if self._slow(len(self.calls)) else 1))
        self.calls.append((rows, steps))

    def measure(
        self,
        max_batch: int = 256,
        piece_steps: int = 64,
        max_batch_steps: int = 2048,
        budget: float = 0.15,
        alike: Curve | None = None,
    ) -> Curve:
        return measure(self.run, max_batch, piece_steps, max_batch_steps, budget, self._clock.now, alike)

    @property
    def spent(self) -> float:
        """Return the duration in seconds."""
        return self._clock.now()


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 64, 100, 200, 256])
@pytest.mark.parametrize("steps", [1, 2, 16, 64])
def test_straight_line_is_recovered_from_its_points(rows: int, steps: int) -> None:
    assert Machine(straight).measure().seconds(rows, steps) == pytest.approx(straight(rows, steps), rel=0.02)


def test_past_the_last_point_cost_is_proportional_to_the_rows() -> None:
    curve = Machine(straight).measure(max_batch=64)
    assert curve.max_rows == 64
    assert curve.seconds(128) == pytest.approx(2 * straight(64, 1))


def test_disturbed_calls_are_ignored() -> None:
    undisturbed = Machine(straight).measure()
    disturbed = Machine(straight, slow=lambda call: call % 3 != 1).measure()
    assert disturbed.points() == [pytest.approx(point) for point in undisturbed.points()]


def test_many_rows_never_cost_less_than_few() -> None:
    def odd(rows: int, steps: int) -> float:
        return straight(rows, steps) * (5 if rows == 16 else 1)

    curve = Machine(odd).measure()
    assert curve.seconds(16) == curve.seconds(24) == pytest.approx(straight(24, 1))
    costs = [curve.seconds(rows) for rows in range(1, 300)]
    assert costs == sorted(costs)


def test_the_best_number_of_rows() -> None:
    assert Machine(straight).measure().best_rows() == 256
    assert Machine(with_a_step).measure().best_rows() == 64


def test_where_more_rows_gain_next_to_nothing_fewer_are_better() -> None:
    curve = Machine(lambda rows, steps: 1e-3 * max(rows, 12) * steps).measure(budget=10.0)
    assert curve.best_rows() == 12


def test_steps_are_measured_with_few_of_them_and_few_rows() -> None:
    machine = Machine(straight)
    curve = machine.measure(piece_steps=64, max_batch_steps=2048)
    assert max(rows * steps for rows, steps in machine.calls if steps > 1) <= 2048
    assert {rows for rows, steps, _ in curve.points() if steps > 1} == {1, 4, 16, 32}


def test_a_model_that_is_only_run_step_by_step() -> None:
    machine = Machine(straight)
    curve = machine.measure(piece_steps=1)
    assert {steps for _, steps in machine.calls} == {1}
    assert curve.seconds(8, 4) >= straight(8, 4)  # a single step is an upper bound for a step of a sequence


def test_a_call_is_repeated_until_three_agree() -> None:
    machine = Machine(straight)
    machine.measure()
    assert {machine.calls.count(size) for size in {*machine.calls}} == {3}


def test_a_disturbed_small_model_is_measured_often_and_within_the_budget() -> None:
    machine = Machine(lambda rows, steps: straight(rows, steps) * (1 + len(machine.calls) % 7 / 5))
    machine.measure(budget=0.15)
    assert machine.calls.count((256, 1)) > 5
    assert machine.spent <= 0.15


def test_model_with_the_cost_of_a_similar_one_reuses_its_curve() -> None:
    alike = Machine(straight).measure()
    for cost in (straight, lambda rows, steps: 1.2 * straight(rows, steps)):
        machine = Machine(cost, slow=lambda call: call < 2)  # the first calls are slower on most machines
        assert machine.measure(alike=alike) is alike
        assert len(machine.calls) == 4


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_model_with_another_cost_than_a_similar_one_is_measured(factor: float) -> None:
    alike = Machine(straight).measure()
    curve = Machine(lambda rows, steps: factor * straight(rows, steps)).measure(budget=0.5, alike=alike)
    assert curve.seconds(64) == pytest.approx(factor * straight(64, 1))


def test_a_large_model_unlike_the_other_is_measured_within_the_budget() -> None:
    machine = Machine(lambda rows, steps: 1e-3 + 4e-4 * rows * steps)  # 103 ms for 256 rows
    curve = machine.measure(alike=Machine(straight).measure())
    assert machine.spent <= 0.15
    assert curve.seconds(256) == pytest.approx(1e-3 + 4e-4 * 256)


def test_a_large_model_is_measured_at_fewer_points() -> None:
    machine = Machine(lambda rows, steps: 1e-3 + 5e-4 * rows * steps)  # 129 ms for 256 rows
    curve = machine.measure(budget=0.15)
    assert machine.spent <= 0.15
    rows = [rows for rows, _ in curve.single]
    assert rows[0] == 1
    assert rows[-1] == 256
    assert 2 < len(rows) < 10


def test_a_model_larger_than_any_budget_is_run_twice() -> None:
    machine = Machine(lambda rows, steps: 1.0 * rows)
    curve = machine.measure(budget=0.15)
    assert machine.calls == [(1, 1), (256, 1)]
    assert curve.seconds(128) == pytest.approx(128.0)


def test_model_errors_propagate() -> None:
    def broken(rows: int, steps: int) -> float:
        raise ValueError("no memory for it")

    with pytest.raises(ValueError, match="no memory"):
        Machine(broken).measure()


@given(
    max_batch=st.integers(1, 1000),
    piece_steps=st.integers(1, 100),
    max_batch_steps=st.integers(1, 5000),
    per_call=st.floats(1e-6, 1e-2),
    per_row=st.floats(1e-7, 1e-2),
)
def test_curve_is_valid_for_any_limits(
    max_batch: int, piece_steps: int, max_batch_steps: int, per_call: float, per_row: float
) -> None:
    machine = Machine(lambda rows, steps: per_call + per_row * rows * steps)
    curve = machine.measure(max_batch, piece_steps, max_batch_steps)
    assert curve.max_rows == max_batch
    assert all(rows <= max_batch and steps <= piece_steps for rows, steps in machine.calls)
    assert 1 <= curve.best_rows() <= max_batch
    for rows in {1, 2, 3, max_batch // 2, max_batch, max_batch + 1} - {0}:
        assert curve.seconds(rows, piece_steps) > 0
