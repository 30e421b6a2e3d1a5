"""The trials of each probe in one table: sizes, scales, seeds and cuts. And the subject of a trial: a model to run."""

from dataclasses import dataclass

import numpy as np

from unroll.bundle import Verifier
from unroll.bundle.golden import Arrays
from unroll.export.signature.samples import Samples


@dataclass(frozen=True, slots=True)
class Trial:
    """Inputs and state rows for one try.

    Attributes:
        batch: number of sequences.
        time: time steps of each.
        input_seed, row_seed: what the inputs and the state rows are drawn with.
        scale: of inputs that are floats, times what the example holds.
        chunkings: ways to cut the sequence, each summing to `time`.
    """

    batch: int
    time: int
    input_seed: int
    row_seed: int
    scale: float = 1.0
    chunkings: tuple[tuple[int, ...], ...] = ()


_CUTS_OF_24 = ((1,) * 24, (5, 1, 9, 2, 7), (23, 1))

#: Is each row's answer its own? Also far outside the example's range, where a maximum over rows shows.
ROWS = tuple(Trial(6, 7, 31, 32, scale) for scale in (1, -2, 4))

#: Does the model stream? Single steps and uneven chunks; many rows, also with inputs outside the example's range, since
#: the largest value so far is often the last one.
STREAMING = (
    Trial(3, 11, 44, 43, 1, ((1,) * 11, (4, 1, 6))),
    Trial(1, 17, 42, 43, 1, ((1,) * 17, (2, 1, 1, 9, 4))),
    Trial(32, 24, 73, 43, 1, _CUTS_OF_24),
    Trial(32, 24, 73, 43, -2, _CUTS_OF_24[1:]),
)

#: The most rows of a trial of streaming, fewer where the state of one has many values to compare.
STREAMING_VALUES, STREAMING_LEAST = 2**16, 8

#: Does it over a long sequence? At least so many steps; 16 times as many if it counts steps and its row does not.
LONG = Trial(1, 1024, 53, 54)
LONG_IF_COUNTED = 16

#: Does it after 2**23 steps, where it counts them?
ENDLESS = Trial(1, 1, 46, 45)

#: Does an output depend on later steps? Other inputs to put there.
AHEAD_SEED = 47

#: State rows that sequences end in, where not any numbers may stand.
REACHED = tuple(Trial(4, time, 81, 82) for time in (4, 7, 19))

#: Does padding make a difference? Long rows, and many short ones: a maximum over time hides the padding
#: unless that is the largest. Fewer rows, down to the least, where the state of one has many values to compare.
PADDED = tuple(Trial(248, 13, 51, 52, scale) for scale in (1, -1, 3, -3))
PADDED_VALUES, PADDED_LEAST = 2**17, 62
PADDED_LONG = Trial(4, 300, 51, 52)
PADDED_LONG_LENGTHS = (300, 40, 150, 283)
PADDED_START_SEED = 53

#: Do cuts, batch size and neighbours change a bit? At least 32 rows, at most 1024. Small batches so many times, fewer
#: where a state has thousands of values.
BITS_TIME, BITS_INPUT_SEED, BITS_ROW_SEED = 24, 62, 63
BITS_MOST, BITS_LEAST = 8, 2

#: Golden vectors: the first that fits into the file.
GOLDEN = tuple(Trial(batch, time, 71, 72) for batch, time in ((3, 24), (3, 16), (2, 16), (2, 12), (2, 8)))

#: How far off is PyTorch in float32? More rows than the golden ones, since the largest of a few errors is often small.
OWN_ERROR_BATCH, OWN_ERROR_INPUT_SEED, OWN_ERROR_ROW_SEED = 32, 77, 78

#: Is anything fixed to the batch and the length that were traced?
SIZES = ((1, 1), (5, 3), (1, 37))
SIZES_INPUT_SEED, SIZES_ROW_SEED = 75, 76

#: What does a reduced precision cost? Also in a large batch, and over a sequence where errors add up.
REDUCED_BATCH, REDUCED_LONG = 32, Trial(2, 256, 81, 82)

#: Which values does an integer input take?
RANGES = Trial(2, 9, 35, 36)

#: Is the lifted model still the user's own, called once, and called again and again?
ORIGINAL = (Trial(3, 10, 25, 26), Trial(2, 23, 25, 26))
CONTINUED = Trial(2, 10, 27, 28, 1, ((4, 1, 5),))

#: Is it over long sequences? Over so many steps, half as many, and so on, down to the shortest. Fewer where steps times
#: weights exceed the next number, but not below the last.
ORIGINAL_LONG = Trial(2, 1024, 29, 30)
ORIGINAL_SHORTEST = 32
ORIGINAL_WEIGHTS, ORIGINAL_LEAST = 2**30, 128

#: Do all steps of a loop do the same? So many, unless that takes more operations, and at least as many as above.
LOOP_STEPS, LOOP_OPERATIONS = 4096, 40_000

#: And where the code has larger numbers? So many steps after the number, if it is not more than so many steps,
#: operations, and steps times weights in all.
FAR_AFTER, FAR_STEPS, FAR_OPERATIONS, FAR_WEIGHTS = 5, 2**17, 2**21, 2**35

#: The most operations of which a log is kept.
FAR_LOGGED = 2**18

#: Which numbers in its conditions grow? Over so many steps.
BRANCHES = (1, 2, 12, 17)


@dataclass(frozen=True, slots=True)
class Subject(Verifier):
    """A model to try, and inputs for it."""

    samples: Samples

    def inputs(self, trial: Trial) -> Arrays:
        """Each (batch, time, ...)."""
        return scaled(self.samples.draw(trial.batch, trial.time, seed=trial.input_seed), trial.scale)

    def rows(self, trial: Trial) -> np.ndarray:
        """(batch, state_size): row 0 is the initial one."""
        return self.samples.rows(trial.batch, self.manifest, seed=trial.row_seed)

    def begin(self, trial: Trial) -> np.ndarray:
        """(batch, state_size): what sequences start from."""
        return self.samples.begin(trial.batch, self.manifest, seed=trial.row_seed)


def scaled(inputs: Arrays, scale: float) -> Arrays:
    """The inputs with those that are floats times `scale`."""
    return {n: (a * scale).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in inputs.items()}
