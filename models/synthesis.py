"""Synthesises sound for the detector: whistles, claps and hums over noise, with labels per frame.

Needs only NumPy, so that examples run without torch.
"""

from dataclasses import dataclass

import numpy as np

#: Samples per second, and samples per frame; a frame is one time step of 16 ms.
RATE, FRAME = 16000, 256
#: A tone counts as an event after this many seconds.
LASTING = 0.2
#: The range of pauses between two claps, and how long the pair counts as an event after the second, in seconds.
PAUSE, SHOWN = (0.15, 0.6), 0.5
#: The detected events, in the order of the model's outputs.
EVENTS = ("whistle", "two claps", "hum")


@dataclass(frozen=True, slots=True)
class Clip:
    """A sound with labels.

    Attributes:
        samples: (frames, 256) float32 in -1 … 1.
        present: (frames, 3) float32, 1 where the frame has the event, otherwise 0.
        judged: (frames, 3) bool; False close to the start and end of an event, where either label is right.
    """

    samples: np.ndarray
    present: np.ndarray
    judged: np.ndarray


def clip(generator: np.random.Generator, seconds: float = 3.0) -> Clip:
    """A clip with up to three sounds: events, or distractors such as single claps and short tones."""
    sound = _Sound(generator, int(seconds * RATE) // FRAME)
    for kind in generator.permutation(["whistle", "hum", "claps", "clap", "blip"])[: generator.integers(0, 4)]:
        sound.add(str(kind), generator.uniform(0.1, seconds - 0.8))
    return sound.clip()


def single(kind: str, generator: np.random.Generator) -> Clip:
    """Two seconds with one sound after half a second: whistle, hum, claps, clap or blip."""
    sound = _Sound(generator, 2 * RATE // FRAME)
    sound.add(kind, 0.5)
    return sound.clip()


class _Sound:
    def __init__(self, generator: np.random.Generator, frames: int) -> None:
        self._generator = generator
        self._samples = np.zeros(frames * FRAME)
        self._times = np.arange(frames) * FRAME / RATE
        self._present = np.zeros((frames, len(EVENTS)), np.float32)
        self._judged = np.ones((frames, len(EVENTS)), bool)

    def add(self, kind: str, start: float) -> None:
        uniform = self._generator.uniform
        if kind == "whistle":
            self._tone(0, start, uniform(0.5, 1.2), uniform(700, 2800), [1.0])
        elif kind == "hum":
            self._tone(
                2, start, uniform(0.5, 1.2), uniform(90, 260), list(uniform(0.1, 1, 10) / np.arange(1, 11) ** 0.5)
            )
        elif kind == "blip":
            self._tone(None, start, uniform(0.03, 0.1), uniform(120, 2800), [1.0])
        else:
            self._clap(start)
            if kind == "claps":
                second = start + uniform(*PAUSE)
                self._clap(second)
                self._mark(1, second, second + SHOWN)

    def clip(self) -> Clip:
        noise = self._generator.standard_normal(len(self._samples))
        if self._generator.random() < 0.5:  # low-pass noise, as in a room
            noise = np.convolve(noise, np.exp(-np.arange(24) / 6), "same") / 2
        samples = self._samples + noise * 10 ** self._generator.uniform(-3.5, -1.8)
        samples = samples * 10 ** self._generator.uniform(-0.8, 0.0)
        return Clip(samples.clip(-1, 1).astype(np.float32).reshape(-1, FRAME), self._present, self._judged)

    def _tone(self, event: int | None, start: float, seconds: float, pitch: float, harmonics: list[float]) -> None:
        """Add a tone with a slightly varying pitch and the given strengths of harmonics."""
        first, count = int(start * RATE), min(int(seconds * RATE), len(self._samples) - int(start * RATE))
        t = np.arange(count) / RATE
        wobble = self._generator.uniform(0, 0.02) * np.sin(2 * np.pi * self._generator.uniform(2, 6) * t)
        glide = self._generator.uniform(-0.1, 0.1) * t
        phase = 2 * np.pi * np.cumsum(pitch * (1 + wobble + glide)) / RATE
        wave = sum(
            strength * np.sin(n * phase + self._generator.uniform(0, 6))
            for n, strength in enumerate(harmonics, 1)
            if n * pitch < RATE / 2.3
        )
        edge = np.minimum(1, np.minimum(t, t[::-1]) / 0.02)
        level = self._generator.uniform(0.1, 0.5) / np.sqrt(np.square(harmonics).sum())
        self._samples[first : first + count] += level * edge * wave
        if event is not None:
            self._mark(event, start + LASTING, start + count / RATE)

    def _clap(self, start: float) -> None:
        first = int(start * RATE)
        count = min(RATE // 4, len(self._samples) - first)
        decay = np.exp(-np.arange(max(count, 0)) / (RATE * self._generator.uniform(0.008, 0.03)))
        self._samples[first : first + count] += (
            self._generator.uniform(0.2, 0.8) * decay * self._generator.standard_normal(len(decay))
        )

    def _mark(self, event: int, begin: float, end: float) -> None:
        self._present[(self._times >= begin) & (self._times < end), event] = 1
        for edge in (begin, end):
            self._judged[abs(self._times - edge) < 0.08, event] = False
