"""Runs a model to find what it supports: streaming, ragged batches, bitwise reproducibility."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from unroll.bundle import Manifest
from unroll.bundle.golden import Arrays
from unroll.bundle.verification import Differences, random_chunks, select_rows
from unroll.export.errors import ExportError
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.signature.samples import Samples
from unroll.export.verification import trials
from unroll.export.verification.divergence import find_divergence
from unroll.export.verification.trials import Subject, Trial

#: In float64 another order of operations costs about 1e-15; a wrong state costs much more than this.
_CLOSE = 1e-9

#: Values to compare bit by bit: some functions round one in hundreds differently, at the end of a vector.
_MANY = 2**13

#: The most steps per call that a model is assumed to need.
_MOST_STEPS = 13


def with_reached(reference: Subject) -> Samples:
    """Add state rows that real sequences end in, if the row holds more than the states of recurrent layers."""
    if all(slot.kind in {"h", "c"} for slot in reference.manifest.state):
        return reference.samples
    rows = reference.begin(trials.REACHED[0])
    ends = [reference.whole(reference.inputs(trial), rows)["state_out"] for trial in trials.REACHED]
    return replace(reference.samples, reached=np.concatenate([end.astype(np.float32) for end in ends]))


def check_rows(reference: Subject) -> None:
    """Check that a sequence's outputs do not depend on the rest of the batch.

    Raises:
        ExportError: rows_mixed, if they do; not_finite, if an allowed NaN reaches an output or the state.
    """
    missing = ", ".join(spec.name for spec in reference.manifest.inputs if spec.nan)
    for trial in trials.ROWS:
        inputs, rows = reference.inputs(trial), reference.rows(trial)
        try:
            together = reference.whole(inputs, rows)
        except ExportError:
            if trial.may_fail:
                continue
            raise
        kept = next((name for name, array in together.items() if np.isnan(array).any()), None)
        if missing and kept is not None:
            what = "the state" if kept == "state_out" else f"output {kept!r}"
            raise ExportError(
                "not_finite",
                f"{what} is NaN where {missing} is; choose with torch.where(torch.isnan(x), a, b), or fill with "
                "torch.nan_to_num, before computing with it or carrying it over",
            )
        for row in range(trial.batch):
            alone = reference.whole(select_rows(inputs, slice(row, row + 1)), rows[row : row + 1])
            for name, array in alone.items():
                if not _close(array, together[name][row : row + 1]):
                    raise ExportError(
                        "rows_mixed",
                        f"{name} of one sequence depends on the other sequences in its batch; forward must treat rows "
                        "independently. If its input is (time, batch, ...), export with batch_first=False",
                    )


def why_not_streamable(subject: Subject, module: StreamingModule) -> str | None:
    """Compare a run in chunks with a run of the whole sequence.

    Args:
        subject: the model in float64.
        module: the same model as a module, to find the layer that differs.

    Returns:
        Why the model does not stream, or None if it does.
    """
    most = _rows(subject, trials.STREAMING_VALUES, trials.STREAMING_LEAST)
    for trial in trials.STREAMING:
        trial = replace(trial, batch=min(trial.batch, most))
        inputs = subject.inputs(trial)
        rows = subject.samples.rows(trial.batch + 1, subject.manifest, seed=trial.row_seed)
        rows = rows[: trial.batch] if trial.batch > 1 else rows[1:]
        try:
            whole = subject.whole(inputs, rows)
        except ExportError:
            if trial.may_fail:
                continue
            raise
        for chunks in trial.chunkings:
            try:
                cut = subject.chunked(inputs, rows.astype(np.float64), chunks)
            except ExportError as error:
                if error.code != "forward_failed":
                    raise
                return f"it cannot run in chunks: {error}"
            wrong = [name for name, array in cut.items() if not _close(array, whole[name])]
            if wrong:
                return _reason(wrong[0], subject, module, inputs, rows, chunks)
    return _why_not_endless(subject)


def _why_not_endless(subject: Subject) -> str | None:
    """Check that a model that counts time steps still runs after 2**23 steps."""
    row = subject.begin(trials.ENDLESS)
    counts = [slot.offset for slot in subject.manifest.state if slot.kind == "count"]
    row[:, counts] = 1.0  # in units of 2**23
    try:
        subject.whole(subject.inputs(trials.ENDLESS), row)
    except ExportError as error:
        return f"it counts time steps, and fails after {2**23} of them (a table of positions?): {error}"
    return None


def why_not_over_long(served: Subject, counted: bool) -> str | None:
    """Compare chunks with the whole over a long sequence, to find dependencies that reach far back.

    Args:
        served: the model on onnxruntime. It is fast, and computes a recurrent layer bit for bit the same however the
            sequence is cut, so a chaotic model's rounding is not mistaken for a difference.
        counted: whether the model counts time steps without keeping the count in its row.
    """
    least = trials.LONG.time * (trials.LONG_IF_COUNTED if counted else 1)
    time = max(least, *(array.shape[1] for array in served.samples.example.values()))
    trial = replace(trials.LONG, time=time, chunkings=((time // 2, 1, time - time // 2 - 1),))
    inputs, rows = served.inputs(trial), served.rows(trial)
    whole = served.whole(inputs, rows)
    for name, array in served.chunked(inputs, rows, trial.chunkings[0]).items():
        if not np.isfinite(whole[name]).all():
            return f"{name!r} becomes infinite or NaN within {time} steps; limit its state, as with torch.tanh or clamp"
        scale = max(1.0, float(np.abs(whole[name]).max()))
        if not np.abs(array.astype(np.float64) - whole[name]).max() <= 1e-3 * scale:
            return f"{name!r} depends on how a long sequence ({time} steps) is cut: something reaches far back in time"
    return None


def _reason(
    output: str, subject: Subject, module: StreamingModule, inputs: Arrays, rows: np.ndarray, chunks: Sequence[int]
) -> str:
    backward = sorted({slot.module for slot in subject.manifest.state if slot.direction == "reverse"})
    if backward:
        return f"layer {', '.join(map(repr, backward))} is bidirectional: it reads the sequence from its end"
    where = find_divergence(module, inputs, rows, chunks)
    ahead = _looks_ahead(subject, inputs, rows)
    if ahead:
        return f"output {ahead!r} at a time step depends on later time steps ({where})"
    return (
        f"{output!r} depends on how the sequence is cut: something other than a recurrent layer carries values "
        f"from one time step to another ({where}). A delay streams as torch.cat([zeros, x[:, :-1]], 1), a difference "
        "as torch.diff(x, dim=1, prepend=x[:, :1]), and anything as a loop over time steps"
    )


def _looks_ahead(subject: Subject, inputs: Arrays, rows: np.ndarray) -> str | None:
    """The name of an output whose past changes when only future inputs change; None if there is none."""
    batch, time = next(iter(inputs.values())).shape[:2]
    other = subject.samples.draw(batch, time, seed=trials.AHEAD_SEED)
    one = subject.whole(inputs, rows)
    for now in range(1, time):
        changed = {n: np.concatenate([a[:, :now], other[n][:, now:]], axis=1) for n, a in inputs.items()}
        two = subject.whole(changed, rows)
        for spec in subject.manifest.outputs:
            if spec.time and not _close(one[spec.name][:, :now], two[spec.name][:, :now]):
                return spec.name
    return None


def with_batching(served: Subject, manifest: Manifest) -> Manifest:
    """Find `bit_exact`, and whether `ragged` holds, for the model on onnxruntime."""
    padding = padding_differs(served)
    ragged = manifest.ragged and all(padding[entry.output] <= entry.tolerance for entry in manifest.parity)
    bit_exact = is_bit_exact(served) and not (ragged and any(padding.values()))
    return replace(manifest, ragged=ragged, bit_exact=bit_exact)


def padding_differs(served: Subject) -> Differences:
    """Measure how much a padded row differs from the same row without padding, for any content of the padding.

    Args:
        served: the model on onnxruntime.

    Returns:
        The largest difference by output and for `state_out`; all zero if every bit is equal.
    """
    rng = np.random.default_rng(50)
    few = _fewest_steps(served)
    batch = min(trials.PADDED[0].batch, _rows(served, trials.PADDED_VALUES, trials.PADDED_LEAST)) // 2 * 2
    long, short = rng.integers(few, 14, batch // 5), np.minimum(few + rng.integers(0, 3, batch - batch // 5), 13)
    lens = np.concatenate([long, short]).astype(np.int32)
    lens[0] = _MOST_STEPS
    tries = [_padded(served, replace(trial, batch=batch), lens) for trial in trials.PADDED]
    with suppress(ExportError):  # a position table may be shorter
        tries.append(_padded(served, trials.PADDED_LONG, np.array(trials.PADDED_LONG_LENGTHS, np.int32)))
    return {name: max(each[name] for each in tries) for name in tries[0]}


def _rows(subject: Subject, values: int, least: int) -> int:
    """The number of rows with about `values` state values in total, but at least `least`."""
    return max(values // max(subject.manifest.state_size, 1), least)


def _padded(served: Subject, trial: Trial, lens: np.ndarray) -> Differences:
    inputs, rows = served.inputs(trial), served.rows(trial)
    rows[::2] = served.samples.begin(trial.batch // 2, served.manifest, seed=trials.PADDED_START_SEED)
    worst: Differences = {}
    for measured in served.padded(inputs, rows, lens):
        for name, value in measured.items():
            worst[name] = max(worst.get(name, 0.0), value)
    return worst


def _fewest_steps(served: Subject) -> int:
    """The fewest steps per call that the model accepts: one that cannot stream may need several."""
    row = served.samples.begin(1, served.manifest, seed=50)
    for count in range(1, _MOST_STEPS):
        try:
            served.run(served.samples.draw(1, count, seed=50), row, np.array([count], np.int32))
        except ExportError:
            continue
        return count
    return _MOST_STEPS


def is_bit_exact(served: Subject) -> bool:
    """Whether every bit of outputs and state on onnxruntime is independent of chunking, batch size and neighbours."""
    time = trials.BITS_TIME
    values = sum(spec.size * (time if spec.time else 1) for spec in served.manifest.outputs)
    batch = min(max(_MANY // values, 32), 1024)
    rng = np.random.default_rng(61)
    trial = Trial(batch, time, trials.BITS_INPUT_SEED, trials.BITS_ROW_SEED)
    inputs, rows = served.inputs(trial), served.rows(trial)
    whole = served.whole(inputs, rows)
    often = min(trials.BITS_MOST, _rows(served, _MANY, trials.BITS_LEAST))
    for size in (8, 17, 33, batch, *(1, 2, 3, 4, 5) * often):
        chosen = rng.integers(0, batch, size)
        chunks = random_chunks(time, rng) if served.manifest.streamable else (time,)
        part = served.chunked(select_rows(inputs, chosen), rows[chosen], chunks)
        if not all(np.array_equal(array, whole[name][chosen]) for name, array in part.items()):
            return False
    return True


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    scale = max(1.0, float(np.max(np.abs(other), where=np.isfinite(other), initial=0.0)))
    return np.allclose(one, other, 0.0, _CLOSE * scale, equal_nan=True)
