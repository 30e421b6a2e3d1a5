"""Reads and writes time steps as samples of WAV files: one time step holds as many samples as the input has values."""

import sys
import wave
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from unroll.client.errors import InvalidInput
from unroll.client.rows import Row
from unroll.client.tensors import Model, Tensor

#: Full scale of the 16-bit samples to write.
_FULL = 2**15


class Reader:
    """The time steps of a WAV file, with samples from -1 to 1.

    Raises:
        InvalidInput: The file or the model does not fit.
    """

    def __init__(self, model: Model, source: BinaryIO) -> None:
        self._input = _samples(model, model.inputs, "input")
        try:
            self._file = wave.Wave_read(source)
        except (wave.Error, EOFError) as error:
            raise InvalidInput(f"this is not a readable WAV file: {error}") from error
        if self._input.size % self._file.getnchannels():
            raise InvalidInput(
                f"{self._file.getnchannels()} channels do not divide the {self._input.size} values of a time step"
            )
        self.frames = self._input.size // self._file.getnchannels()
        self.rate = self._file.getframerate()
        values = self.rate * self._file.getnchannels()
        if self._input.rate not in (None, values):
            raise InvalidInput(
                f"the file has {values} samples a second, and {model.name!r} takes {self._input.rate:g}: convert it"
            )
        self.steps = -(-self._file.getnframes() // self.frames)

    def __iter__(self) -> Iterator[Row]:
        width = self._file.getsampwidth()
        while len(content := self._file.readframes(self.frames)) >= width:
            samples = _decoded(content[: len(content) // width * width], width)  # a cut file ends within a sample
            if missing := self._input.size - len(samples):
                print(f"the last time step is padded with {missing} zeros", file=sys.stderr)
                samples = np.pad(samples, (0, missing))
            yield (samples.astype(self._input.numpy).reshape(self._input.shape),)


class Writer:
    """Writes outputs as 16-bit samples in one channel, clipped to -1 and 1.

    Args:
        model: The model.
        out: The file to write.
        source: The file whose rate determines the rate of time steps.
        steps: The number of time steps, for the file's header.
    """

    def __init__(self, model: Model, out: BinaryIO, source: Reader, steps: int) -> None:
        size = _samples(model, model.outputs, "output").size
        rate, rest = divmod(source.rate * size, source.frames)
        if rest or rate == 0:
            raise InvalidInput(f"{size} values per time step are not a whole number of samples a second: add --to csv")
        self._file = wave.Wave_write(out)
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(rate)
        self._file.setnframes(steps * size)

    def __call__(self, arrays: Sequence[np.ndarray]) -> None:
        samples = np.rint(np.clip(arrays[0], -1.0, 1.0) * _FULL).clip(-_FULL, _FULL - 1)
        self._file.writeframesraw(samples.astype("<i2").tobytes())


def _samples(model: Model, tensors: Sequence[Tensor], kind: str) -> Tensor:
    if len(tensors) != 1 or tensors[0].numpy.kind != "f":
        raise InvalidInput(f"{model.name!r} has no samples as {kind}: WAV needs one {kind} of floats")
    return tensors[0]


def _decoded(content: bytes, width: int) -> np.ndarray:
    if width == 1:
        return np.frombuffer(content, "u1").astype(np.float32) / 128 - 1
    padded = np.zeros((len(content) // width, 4), "u1")
    padded[:, 4 - width :] = np.frombuffer(content, "u1").reshape(-1, width)
    return padded.view("<i4")[:, 0].astype(np.float64) / 2**31
