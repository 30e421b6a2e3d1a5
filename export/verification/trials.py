"""The trials of each probe: sizes, scales, seeds and cuts. `Subject` is the model that a trial runs."""

from dataclasses import dataclass

import numpy as np

from unroll.bundle import Verifier
from unroll.bundle.golden import Arrays
from unroll.export.signature.samples import Samples


@dataclass(frozen=True, slots=True)
class Trial:
    """The inputs and state rows of one run.

    Attributes:
        batch: number of sequences.
        time: time steps per sequence.
        input_seed, row_seed: seeds of the inputs and the state rows.
        scale: factor on float inputs, relative to the example.
        growth: further factors, from one row to the next and from one step to the next.
        chunkings: ways to cut the sequence, each summing to `time`.
    """

    batch: int
    time: int
    input_seed: int
    row_seed: int
    scale: float = 1.0
    chunkings: tuple[tuple[int, ...], ...] = ()
    growth: tuple[float, float] = (1.0, 1.0)

    @property
    def may_fail(self) -> bool:
        """Are the inputs so far outside the example's range that forward may refuse them?"""
        return abs(self.scale) > 4 or max(self.growth) > 1


_CUTS_OF_24 = ((1,) * 24, (5, 1, 9, 2, 7), (23, 1))

#: Are the rows of a batch independent? Also tried far outside the example's range, where a maximum over rows shows, and
#: with rows of very different sizes, where a threshold on it shows.
ROWS = (*(Trial(6, 7, 31, 32, scale) for scale in (1, -2, 4, 32)), Trial(6, 7, 31, 32, growth=(16, 1)))

#: Does the model stream? Single steps and uneven chunks; many rows, also with inputs outside the example's range,
#: because a running maximum is often just the latest value.
STREAMING = (
    Trial(4, 11, 44, 43, 1, ((1,) * 11, (4, 1, 6))),
    Trial(1, 17, 42, 43, 1, ((1,) * 17, (2, 1, 1, 9, 4))),
    Trial(32, 24, 73, 43, 1, _CUTS_OF_24),
    Trial(32, 24, 73, 43, -2, _CUTS_OF_24[1:]),
    Trial(8, 24, 73, 43, 32, _CUTS_OF_24[1:]),
    Trial(8, 24, 73, 43, 1, _CUTS_OF_24[1:], growth=(1, 2)),
)

#: Limits the rows of a streaming trial: so many state values in total, but at least so many rows.
STREAMING_VALUES, STREAMING_LEAST = 2**16, 8

#: Does it stream over a long sequence? 16 times as many steps if the model counts them outside its row.
LONG = Trial(1, 1024, 53, 54)
LONG_IF_COUNTED = 16

#: Does a model that counts steps still run after 2**23 steps?
ENDLESS = Trial(1, 1, 46, 45)

#: Does an output depend on later steps? The seed of the changed future inputs.
AHEAD_SEED = 47

#: State rows that sequences end in, for states that cannot hold arbitrary numbers.
REACHED = tuple(Trial(4, time, 81, 82) for time in (4, 7, 19))

#: Does padding make a difference? A few long rows and many short ones: a maximum over time hides padding unless the
#: padding holds the largest value. The number of rows is limited as for streaming.
PADDED = tuple(Trial(248, 13, 51, 52, scale) for scale in (1, -1, 3, -3))
PADDED_VALUES, PADDED_LEAST = 2**17, 62
PADDED_LONG = Trial(4, 300, 51, 52)
PADDED_LONG_LENGTHS = (300, 40, 150, 283)
PADDED_START_SEED = 53

#: Do cuts, batch size or neighbours change any bit? BITS_MOST and BITS_LEAST bound the repetitions of small batches,
#: which are fewer for large states.
BITS_TIME, BITS_INPUT_SEED, BITS_ROW_SEED = 24, 62, 63
BITS_MOST, BITS_LEAST = 24, 2

#: Golden vectors: the first trial that fits into the file is used.
GOLDEN = tuple(Trial(batch, time, 71, 72) for batch, time in ((3, 24), (3, 16), (2, 16), (2, 12), (2, 8)))

#: How large is PyTorch's float32 error? More rows than the golden vectors, since the maximum of few errors is too low.
OWN_ERROR_BATCH, OWN_ERROR_INPUT_SEED, OWN_ERROR_ROW_SEED = 32, 77, 78

#: Does the graph depend on the batch size or length it was traced with?
SIZES = ((1, 1), (5, 3), (1, 37))
SIZES_INPUT_SEED, SIZES_ROW_SEED = 75, 76

#: How large is the error in reduced precision? Also in a large batch, and over a sequence where errors add up.
REDUCED_BATCH, REDUCED_LONG = 32, Trial(2, 256, 81, 82)

#: Which values does an integer input accept?
RANGES = Trial(2, 9, 35, 36)

#: Does the lifted model equal the user's own, for a single call and for successive calls? Also far outside the
#: example's range, if forward takes such numbers: a clamp may hide a dependency. Large float64 matrices multiply four
#: rows faster than three.
ORIGINAL = (Trial(4, 10, 25, 26), Trial(2, 23, 25, 26))
EXTREME = tuple(Trial(4, 10, 25, 26, scale) for scale in (32, -32, 0.001))
CONTINUED = Trial(2, 10, 27, 28, 1, ((4, 1, 5),))

#: And over long sequences? Lengths are halved from ORIGINAL_LONG down to ORIGINAL_SHORTEST. The longest is reduced, but
#: not below ORIGINAL_LEAST, where steps times weights exceed ORIGINAL_WEIGHTS.
ORIGINAL_LONG = Trial(2, 1024, 29, 30)
ORIGINAL_SHORTEST = 32
ORIGINAL_WEIGHTS, ORIGINAL_LEAST = 2**30, 128

#: Do all steps of a loop do the same? Limits on steps and operations, but never fewer steps than ORIGINAL_LONG.
LOOP_STEPS, LOOP_OPERATIONS = 4096, 40_000

#: And beyond a larger number in the code? The steps to run after it, and limits on the number itself, on operations,
#: and on steps times weights.
FAR_AFTER, FAR_STEPS, FAR_OPERATIONS, FAR_WEIGHTS = 5, 2**17, 2**21, 2**35

#: The most operations to log in such a run.
FAR_LOGGED = 2**18

#: Does a forward that loops over rows do the same for all?
ROW_LOOP = Trial(67, 2, 37, 38)

#: Which numbers in conditions grow with the length? The lengths to compare.
BRANCHES = (1, 2, 12, 17)


@dataclass(frozen=True, slots=True)
class Subject(Verifier):
    """A model under trial, and its inputs."""

    samples: Samples

    def inputs(self, trial: Trial) -> Arrays:
        """The inputs, each (batch, time, ...)."""
        drawn = self.samples.draw(trial.batch, trial.time, seed=trial.input_seed)
        return {name: _scaled(array, trial.scale, trial.growth) for name, array in drawn.items()}

    def rows(self, trial: Trial) -> np.ndarray:
        """State rows (batch, state_size); row 0 is the initial row."""
        return self.samples.rows(trial.batch, self.manifest, seed=trial.row_seed)

    def begin(self, trial: Trial) -> np.ndarray:
        """Initial state rows (batch, state_size)."""
        return self.samples.begin(trial.batch, self.manifest, seed=trial.row_seed)


def _scaled(array: np.ndarray, scale: float, growth: tuple[float, float]) -> np.ndarray:
    """Multiply floats (batch, time, ...) by `scale`, and by a power of each factor in `growth`."""
    if array.dtype.kind != "f":
        return array
    rows, steps = (factor ** np.arange(size) for factor, size in zip(growth, array.shape[:2], strict=True))
    return (array * (scale * np.multiply.outer(rows, steps)).reshape(*array.shape[:2], *[1] * (array.ndim - 2))).astype(
        array.dtype
    )
