"""Checks that the graph equals the user's own model over long sequences, where the code may behave differently."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from torch import nn

from unroll.bundle.golden import Arrays
from unroll.export.errors import ExportError
from unroll.export.lifting.splitting import Split, find_loops
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.loading.copies import detached_copy
from unroll.export.verification import trials
from unroll.export.verification.branches import Branch, BranchLog, is_readable
from unroll.export.verification.decisions import Decided
from unroll.export.verification.iterations import Call, OperationLog, Place, irregular, step_of
from unroll.export.verification.large_numbers import LargeNumber, find_large_numbers
from unroll.export.verification.original import ask_original
from unroll.export.verification.trials import Subject, Trial

#: Relative tolerance in float64, and the error of the float32 graph above which the float64 models are compared.
_CLOSE, _SUSPICIOUS = 1e-9, 1e-4

#: Perturbation of inputs and states that shows how strongly a model amplifies rounding.
_NUDGE = 1e-12


@dataclass(frozen=True, slots=True)
class Shape:
    """Operation counts of a call: before, between and after its loops (`gaps`), and per step of each loop (`sizes`)."""

    gaps: list[int]
    sizes: list[int]

    def loops(self, count: int, steps: int) -> Iterator[tuple[slice, int, int, int]]:
        """Per loop: its slice of `count` operations, the operations before it, those around it, and those per step."""
        begin = 0
        for which, size in enumerate(self.sizes):
            end = begin + self.gaps[which] + size * steps
            last = which == len(self.sizes) - 1
            stop = count if last else end + self.gaps[which + 1]
            yield slice(begin, stop), self.gaps[which], sum(self.gaps[which : which + 2]), size
            begin = end


@dataclass(frozen=True, slots=True)
class LongSequences:
    """The checks of one model.

    Attributes:
        exact: the user's own model in float64.
        double, reference: the lifted model in float64.
        is_changed: whether a call of `exact` modifies its attributes.
        progress: called with a line of text before a slow check.
    """

    exact: nn.Module
    double: StreamingModule
    reference: Subject
    is_changed: bool
    progress: Callable[[str], None]

    def check_loops(self) -> LargeNumber | None:
        """Check that the lifted loops do the same in every step.

        Returns:
            The largest number in the code that is a possible sequence length, if it exceeds the regular trials.

        Raises:
            ExportError: calls_depend_on_time, if a step behaves differently, or may.
        """
        loops = [path for path, module in self.double.model.named_modules() if _loops_itself(path, module)]
        if not loops:
            return None
        by_row = any(getattr(self.double.model.get_submodule(path), "unroll_by_row", False) for path in loops)
        most = 1 if by_row else trials.ORIGINAL_LONG.batch
        brief = [replace(trials.ORIGINAL_LONG, batch=most, time=time) for time in (3, 5)]
        # Once more than needed: a first call may fill a cache.
        _, *short = [self._run(trial, loops, places=True)[0].calls for trial in (brief[0], *brief)]
        shapes = {
            path: [self._shape(path, three, five) for three, five in zip(*(c[path] for c in short), strict=True)]
            for path in loops
        }
        each = sum(size for found in shapes.values() for shape in found for size in shape.sizes)
        steps = min(max(trials.LOOP_OPERATIONS // each, trials.ORIGINAL_LONG.time), trials.LOOP_STEPS)
        numbers = find_large_numbers([partial(self._run, trial, []) for trial in brief], steps)
        far = self._far(numbers, each)
        if far:
            self.progress(f"trying it over {far.value} time steps, a number in {far.place}")
        for trial in (replace(trial, batch=min(trial.batch, most)) for trial in (*_beyond(far), *self._trials(steps))):
            logged = loops if trial.time <= steps or trial.time * each <= trials.FAR_LOGGED else []
            try:
                log, _ = self._run(trial, logged)
            except ExportError:
                continue  # the model refuses sequences of this length
            for path, calls in log.calls.items():
                for number, (call, shape) in enumerate(zip(calls, shapes[path], strict=True)):
                    self._check_call(path, number, call, shape, trial, far)
            self._check_branches(trial, "time")
            break
        if by_row:
            self._check_branches(trials.ROW_LOOP, "batch")
        return far

    def _far(self, numbers: list[LargeNumber], each: int) -> LargeNumber | None:
        """The largest number that can be tried, at `each` operations per step."""
        weights = sum(parameter.numel() for parameter in self.exact.parameters())
        most = min(trials.FAR_STEPS, trials.FAR_OPERATIONS // each, trials.FAR_WEIGHTS // max(weights, 1))
        for number in numbers:
            if number.ends and number.value > most:
                raise ExportError(
                    "calls_depend_on_time",
                    f"forward loops over time steps, and step {number.value} may differ from the steps before it: "
                    f"{number.value} is a number, or a length, in {number.place}, and such a long sequence is not "
                    "tried; make every step do the same, and pass any differences between steps as an input",
                )
        return next((number for number in reversed(numbers) if number.value <= most), None)

    def check_answers(self, served: Subject, far: LargeNumber | None) -> None:
        """Check that the graph answers like the user's own model, including over `far` steps.

        Raises:
            ExportError: parity, if the answers differ.
        """
        weights = sum(parameter.numel() for parameter in self.exact.parameters())
        fewer = trials.ORIGINAL_WEIGHTS // max(weights, 1)
        most = min(trials.ORIGINAL_LONG.time, max(fewer, trials.ORIGINAL_LEAST))
        for trial in (*_beyond(far), *self._trials(most)):
            try:
                _, own = self._run(trial, [])
            except ExportError:
                continue
            self._compare(trial, own, served, far if far and trial.time >= far.value else None)

    def _trials(self, time: int) -> Iterator[Trial]:
        """Trials from long to short; the longest is at least as long as the example."""
        time = max(time, *(array.shape[1] for array in self.reference.samples.example.values()))
        while time >= trials.ORIGINAL_SHORTEST:
            yield replace(trials.ORIGINAL_LONG, time=time)
            time //= 2

    def _run(self, trial: Trial, loops: list[str], *, places: bool = False) -> tuple[OperationLog, Arrays]:
        """Run the user's own model, logging the modules at the paths `loops`. Returns the log and the outputs."""
        inputs, rows = self.reference.inputs(trial), self.reference.begin(trial)
        exact = detached_copy(self.exact) if self.is_changed else self.exact
        log = OperationLog(exact, loops, places=places)
        with log.running() if loops else Decided.as_written():
            what = f"{trial.batch} sequences of {trial.time} time steps"
            returned = ask_original(what, exact, self.double, inputs, rows)
        outputs = self.double.outputs
        return log, {o.spec.name: o.batch_major(returned[o.index][1]).numpy() for o in outputs}

    def _shape(self, path: str, three: Call, five: Call) -> Shape:
        """Derive the shape from calls over three and five time steps."""
        found: Split | None = getattr(self.double.model.get_submodule(path), "unroll_split", None)
        if found:
            return Shape(found.gaps, found.sizes)
        # One loop of the trace may be several in Python: one cuts the inputs, another consumes the parts.
        loops = find_loops(three.signature(), five.signature()) or []
        if len(loops) > 1:
            sizes = [size for _, size in loops]
            begins = [*(begin for begin, _ in loops), len(three.operations)]
            ends = [0, *(begin + 3 * size for begin, size in loops)]
            return Shape([begin - end for begin, end in zip(begins, ends, strict=True)], sizes)
        size = (len(five.operations) - len(three.operations)) // 2
        return Shape([0, len(three.operations) - 3 * size], [size])

    def _check_call(
        self, path: str, number: int, call: Call, shape: Shape, trial: Trial, far: LargeNumber | None
    ) -> None:
        delay = getattr(getattr(self.double.model.get_submodule(path), "unroll_scan", None), "delay", 0)
        for part, before, around, size in shape.loops(len(call.operations), trial.time):
            operations = call.operations[part]
            index = irregular(operations, (around + 3 * size, around + 5 * size), trial.time, delay)
            if index is None:
                continue
            again = self._run(trial, [path], places=True)[0].calls[path][number]
            place, first = again.places[part][index], part.start + before
            again, ended = Call(again.operations[first:], again.places[first:]), index == len(operations) - 1
            name, step = path or type(self.exact).__name__, step_of(again, index - before, size) + ended
            if far and step == far.value:
                place = far.place
            raise ExportError(
                "calls_depend_on_time",
                f"{name!r} loops over time steps, and step {step} (counted from 0) differs from the steps before it "
                f"({place}); make every step do the same, and pass any differences between steps as an input",
            )

    def _check_branches(self, long: Trial, axis: Literal["time", "batch"]) -> None:
        """Refuse a model if a branch might go the other way after more steps, or rows, than any trial has."""
        things, each = ("time steps", "step") if axis == "time" else ("the rows of a batch", "row")
        if not is_readable():
            raise ExportError(
                "calls_depend_on_time",
                f"forward loops over {things}, and whether a later {each} may differ cannot be found out on Python "
                f"{sys.version.split()[0]}; export it with Python 3.11, 3.12, 3.13 or 3.14",
            )
        log, most = BranchLog(), getattr(long, axis)
        for size in (*trials.BRANCHES, most):
            with suppress(ExportError), log.running():
                self._run(replace(long, **{axis: size}), [])  # type: ignore[arg-type]
            if size == trials.BRANCHES[-1] and not log.undecided():
                return
        for site in log.undecided():
            what, so_far = (
                ("a branch depends on", f"It went one way for {most} {each}s, and may go the other way later")
                if isinstance(site, Branch)
                else ("a value depends on", f"It followed one rule for {most} {each}s, and may follow another later")
            )
            raise ExportError(
                "calls_depend_on_time",
                f"forward loops over {things}, and {what} a number that grows with them "
                f"({Place(site.code.co_filename, site.line, ())}). {so_far}; make every {each} do the same, and pass "
                f"any differences between {each}s as an input",
            )

    def _compare(self, trial: Trial, own: Arrays, served: Subject, far: LargeNumber | None) -> None:
        inputs, rows = self.reference.inputs(trial), self.reference.begin(trial)
        answers = served.whole(inputs, rows)
        if all(_differs(answers[name], array, _SUSPICIOUS) is None for name, array in own.items()):
            return
        lifted = self.reference.whole(inputs, rows)
        noise = self.reference.whole(*self._nudged(inputs, rows))
        for name, array in own.items():
            step = _differs(lifted[name], array, _CLOSE, noise[name])
            if step is not None and not np.isfinite(array).all():
                raise ExportError(
                    "not_finite",
                    f"output {name!r} becomes infinite or NaN within {trial.time} time steps, in forward itself, whose "
                    "state grows without limit; limit it, as with torch.tanh or clamp",
                )
            if step is not None:
                where = f" ({far.value} is a number, or a length, in {far.place})" if far else ""
                raise ExportError(
                    "parity",
                    f"output {name!r} of sequences of {trial.time} time steps differs from forward's own{step}, unlike "
                    "that of short ones: forward changes its behaviour in long sequences (a branch on the length or on "
                    f"the number of a step, a part of fixed length){where}; make it treat all lengths and steps alike",
                )

    def _nudged(self, inputs: Arrays, rows: np.ndarray) -> tuple[Arrays, np.ndarray]:
        rows = rows.astype(np.float64)
        for slot in self.reference.manifest.state:
            if slot.kind in {"h", "c", "carry"}:
                rows[:, slot.offset : slot.offset + slot.size] += _NUDGE
        return {
            name: array.astype(np.float64) * (1 + _NUDGE) if array.dtype.kind == "f" else array
            for name, array in inputs.items()
        }, rows


def _beyond(far: LargeNumber | None) -> Iterator[Trial]:
    """One trial with more steps than the number, and one with exactly as many, in case a table ends there."""
    for more in (trials.FAR_AFTER, 0) if far else ():
        yield replace(trials.ORIGINAL_LONG, batch=1, time=far.value + more)  # type: ignore[union-attr]


def _loops_itself(path: str, module: nn.Module) -> bool:
    """Does the user's own module at this path loop over time steps?"""
    return hasattr(module, "unroll_split") or (hasattr(module, "unroll_loop") and "unroll_loops" not in path.split("."))


def _differs(found: np.ndarray, expected: np.ndarray, close: float, noise: np.ndarray | None = None) -> str | None:
    """Describe the difference for a message; None if there is none.

    Args:
        found, expected: the two answers.
        close: relative tolerance.
        noise: `found` recomputed from nudged inputs; its deviation is tolerated, and grows over time.
    """
    if found.shape != expected.shape:
        return f" (it has the shape {expected.shape}, not {found.shape})"
    if not expected.size:
        return None
    scale = float(np.abs(expected).max()) if expected.dtype.kind == "f" else 0.0
    allowed = np.full(expected.shape, close * scale)
    if noise is not None:
        allowed = np.maximum(allowed, np.abs(noise.astype(np.float64) - found))
        allowed = np.maximum.accumulate(allowed.max(axis=0, keepdims=True), axis=1) if expected.ndim > 1 else allowed
    wrong = ~(np.abs(found.astype(np.float64) - expected) <= allowed)
    if not wrong.any():
        return None
    return f" from step {int(wrong.nonzero()[1].min())} on" if expected.ndim > 1 else ""
