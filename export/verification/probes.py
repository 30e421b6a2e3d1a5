"""Decides what a model may be used for by running it: streaming, ragged batches, bitwise equality."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from unroll.bundle import Manifest, RunFunction, Verifier
from unroll.bundle.golden import Arrays
from unroll.bundle.verification import Differences, random_chunks, select_rows
from unroll.export.errors import ExportError
from unroll.export.lifting.streaming import StreamingModule
from unroll.export.signature.samples import Samples
from unroll.export.verification.divergence import find_culprit

#: In float64 a different order of operations costs about 1e-15; a wrong state costs much more than this.
_CLOSE = 1e-9

#: Values to be compared bit by bit: some functions round one in hundreds otherwise, at the end of a vector.
_MANY = 2**13

#: Steps of the longest sequence that is tried, whole and cut, unless the example is longer, or steps are counted.
LONG = 1024


def with_reached(reference: RunFunction, samples: Samples, manifest: Manifest) -> Samples:
    """With state rows that sequences end in, if the state is more than that of recurrent layers."""
    if all(slot.kind in {"h", "c"} for slot in manifest.state):
        return samples
    rows = samples.begin(4, manifest, seed=82)
    ends = [
        Verifier(reference, manifest).whole(samples.draw(4, time, seed=81), rows)["state_out"].astype(np.float32)
        for time in (4, 7, 19)
    ]
    return replace(samples, reached=np.concatenate(ends))


def check_rows(reference: RunFunction, samples: Samples, manifest: Manifest) -> None:
    """Raises ExportError(rows_mixed) if a sequence's outputs depend on the others in its batch."""
    batch, time = 6, 7
    verifier = Verifier(reference, manifest)
    for scale in (1, -2, 4):
        inputs = _scaled(samples.draw(batch, time, seed=31), scale)
        rows = samples.rows(batch, manifest, seed=32)
        together = verifier.whole(inputs, rows)
        for row in range(batch):
            one = slice(row, row + 1)
            for name, array in verifier.whole(select_rows(inputs, one), rows[one]).items():
                if not _close(array, together[name][one]):
                    raise ExportError(
                        "rows_mixed",
                        f"{name} of one sequence depends on the others in its batch; forward must treat rows "
                        "independently (is the input (time, batch, ...)? then say batch_first=False)",
                    )


def why_not_streamable(run: RunFunction, module: StreamingModule, samples: Samples, manifest: Manifest) -> str | None:
    """None if running in chunks, carrying the state, equals running the whole sequence; else why, in words.

    `run` and `module` compute in float64. Three lengths and batch sizes, single steps and uneven chunks; many rows, of
    inputs beyond the example's too, since the largest so far is often the last.
    """
    verifier = Verifier(run, manifest)
    many = [(1,) * 24, (5, 1, 9, 2, 7), (23, 1)]
    for batch, scale, chunkings in (
        (3, 1, [(1,) * 11, (4, 1, 6)]),
        (1, 1, [(1,) * 17, (2, 1, 1, 9, 4)]),
        (32, 1, many),
        (32, -2, many[1:]),
    ):
        time = sum(chunkings[0])
        inputs = _scaled(samples.draw(batch, time, seed=41 + batch), scale)
        rows = samples.rows(batch + 1, manifest, seed=43)
        rows = rows[:batch] if batch > 1 else rows[1:]
        whole = verifier.whole(inputs, rows)
        for chunks in chunkings:
            try:
                cut = verifier.chunked(inputs, rows.astype(np.float64), chunks)
            except ExportError as error:
                if error.code != "forward_failed":
                    raise
                return f"it cannot run in chunks: {error}"
            wrong = [name for name, array in cut.items() if not _close(array, whole[name])]
            if wrong:
                return _reason(wrong[0], run, module, inputs, rows, chunks, samples, manifest)
    return _why_not_for_ever(run, samples, manifest)


def _scaled(inputs: Arrays, scale: float) -> Arrays:
    """Those that are floats."""
    return {n: (a * scale).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in inputs.items()}


def _why_not_for_ever(run: RunFunction, samples: Samples, manifest: Manifest) -> str | None:
    """Where time steps are counted: does it go on after millions of them?"""
    row = samples.begin(1, manifest, seed=45)
    counts = [slot.offset for slot in manifest.state if slot.kind == "count"]
    row[:, counts] = 1.0  # of 2**23
    try:
        Verifier(run, manifest).whole(samples.draw(1, 1, seed=46), row)
    except ExportError as error:
        return f"it counts time steps, and fails after {2**23} of them (a table of positions?): {error}"
    return None


def why_not_over_long(run: RunFunction, samples: Samples, manifest: Manifest, steps: int = LONG) -> str | None:
    """The same question over a sequence of so many steps or the example's length, for what reaches far back.

    `run` is onnxruntime's: it is fast, and repeats a recurrent layer bit for bit however the sequence is cut, so that
    not even a chaotic model's rounding is taken for a difference.
    """
    time = max(steps, *(array.shape[1] for array in samples.example.values()))
    inputs, rows = samples.draw(1, time, seed=53), samples.rows(1, manifest, seed=54)
    verifier = Verifier(run, manifest)
    whole = verifier.whole(inputs, rows)
    for name, array in verifier.chunked(inputs, rows, (time // 2, 1, time - time // 2 - 1)).items():
        scale = max(1.0, float(np.abs(whole[name]).max()))
        if not np.abs(array.astype(np.float64) - whole[name]).max() <= 1e-3 * scale:
            return f"{name!r} depends on how a long sequence ({time} steps) is cut: something reaches far back in time"
    return None


def _reason(
    output: str,
    run: RunFunction,
    module: StreamingModule,
    inputs: Arrays,
    rows: np.ndarray,
    chunks: Sequence[int],
    samples: Samples,
    manifest: Manifest,
) -> str:
    backward = sorted({slot.module for slot in manifest.state if slot.direction == "reverse"})
    if backward:
        return f"layer {', '.join(map(repr, backward))} is bidirectional: it reads the sequence from its end"
    where = find_culprit(module, inputs, rows, chunks)
    ahead = _looks_ahead(run, inputs, rows, samples, manifest)
    if ahead:
        return f"output {ahead!r} at a time step depends on later time steps ({where})"
    return (
        f"{output!r} depends on how the sequence is cut: something other than a recurrent layer carries values "
        f"from one time step to another ({where})"
    )


def _looks_ahead(
    run: RunFunction, inputs: Arrays, rows: np.ndarray, samples: Samples, manifest: Manifest
) -> str | None:
    """The name of an output whose past changes when only the future inputs do."""
    batch, time = next(iter(inputs.values())).shape[:2]
    other = samples.draw(batch, time, seed=47)
    verifier = Verifier(run, manifest)
    for now in range(1, time):
        changed = {n: np.concatenate([a[:, :now], other[n][:, now:]], axis=1) for n, a in inputs.items()}
        one, two = verifier.whole(inputs, rows), verifier.whole(changed, rows)
        for spec in manifest.outputs:
            if spec.time and not _close(one[spec.name][:, :now], two[spec.name][:, :now]):
                return spec.name
    return None


def padding_differs(run: RunFunction, samples: Samples, manifest: Manifest) -> dict[str, float]:
    """By output and `state_out`: how much a padded row differs from the same row alone, whatever lies in the padding.

    All zero: not by a bit. `run` is onnxruntime's.
    """
    rng = np.random.default_rng(50)
    # Many rows, from one step on if it can: a maximum over time hides the padding as long as that is not the largest.
    few = _fewest_steps(run, samples, manifest)
    lens = np.concatenate([rng.integers(few, 14, 48), np.minimum(few + rng.integers(0, 3, 200), 13)]).astype(np.int32)
    lens[0] = 13
    tries = [_padded(run, samples, manifest, lens, scale) for scale in (1, -1, 3, -3)]
    with suppress(ExportError):  # a table of positions may end before
        # A few long ones: some reach far.
        tries.append(_padded(run, samples, manifest, np.array([300, 40, 150, 283], np.int32), 1))
    return {name: max(each[name] for each in tries) for name in tries[0]}


def _padded(run: RunFunction, samples: Samples, manifest: Manifest, lens: np.ndarray, scale: float) -> dict[str, float]:
    """scale: of inputs that are floats, beside what the example holds."""
    time = int(lens[0])
    inputs, rows = samples.draw(len(lens), time, seed=51), samples.rows(len(lens), manifest, seed=52)
    inputs = _scaled(inputs, scale)
    rows[::2] = samples.begin(len(lens) // 2, manifest, seed=53)
    worst: Differences = {}
    for measured in Verifier(run, manifest).padded(inputs, rows, lens):
        for name, value in measured.items():
            worst[name] = max(worst.get(name, 0.0), value)
    return worst


def _fewest_steps(run: RunFunction, samples: Samples, manifest: Manifest) -> int:
    """A model that cannot stream may need more than one at a time."""
    row = samples.begin(1, manifest, seed=50)
    for steps in range(1, 13):
        try:
            run(samples.draw(1, steps, seed=50), row, np.array([steps], np.int32))
        except ExportError:
            continue
        return steps
    return 13


def is_bit_exact(run: RunFunction, samples: Samples, manifest: Manifest) -> bool:
    """True if chunking, batch size and neighbours change no bit of any output or state. `run` is onnxruntime's."""
    time = 24
    values = sum(spec.size * (time if spec.time else 1) for spec in manifest.outputs)
    batch = min(max(_MANY // values, 32), 1024)
    rng = np.random.default_rng(61)
    inputs, rows = samples.draw(batch, time, seed=62), samples.rows(batch, manifest, seed=63)
    verifier = Verifier(run, manifest)
    whole = verifier.whole(inputs, rows)
    for size in (8, 17, 33, batch, *(1, 2, 3, 4, 5) * 8):
        chosen = rng.integers(0, batch, size)
        chunks = random_chunks(time, rng) if manifest.streamable else (time,)
        part = verifier.chunked(select_rows(inputs, chosen), rows[chosen], chunks)
        if not all(np.array_equal(array, whole[name][chosen]) for name, array in part.items()):
            return False
    return True


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    scale = max(1.0, float(np.max(np.abs(other))))
    return bool(np.max(np.abs(one - other)) <= _CLOSE * scale)
