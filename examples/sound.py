"""Send sound through a session in frames of 16 ms, and print the detected whistles, double claps and hums.

python -m unroll.examples.sound              synthesised sound: each event, and other sounds
python -m unroll.examples.sound FILE.wav     a recording: 16,000 samples per second, one channel, 16 bits

Needs a server for `examples/repository`, such as that of `make run`, but no torch.
"""

import argparse
import sys
import wave
from pathlib import Path

import numpy as np

from unroll.client import Client, Session, errors
from unroll.models import synthesis
from unroll.models.synthesis import EVENTS, FRAME, RATE

THRESHOLD = 0.5


def main(argv: list[str]) -> int:
    """Run the example. Returns 0, or 1 without a server or a valid recording."""
    parser = argparse.ArgumentParser(
        prog="python -m unroll.examples.sound", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE.wav", help="a recording (default: synthesised sound)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        sounds = {str(options.file): recorded(options.file)} if options.file else synthesised()
        with Client(options.url) as client:
            for name, frames in sounds.items():
                with client.session("sound") as session:
                    found = detected(session, frames)
                events = [f"{event} at {seconds:.1f} s" for seconds, event in found]
                print(f"{name:<10} {', '.join(events) or 'nothing'}")
    except (errors.UnrollError, OSError, wave.Error, ValueError) as error:
        print(f"unroll.examples.sound: {error}", file=sys.stderr)
        return 1
    return 0


def synthesised() -> dict[str, np.ndarray]:
    """Two seconds of each kind of sound."""
    generator = np.random.default_rng(7)
    return {kind: synthesis.single(kind, generator).samples for kind in ("whistle", "claps", "hum", "clap", "blip")}


def recorded(file: Path) -> np.ndarray:
    """Read the frames of a recording, (frames, 256). Raises ValueError for another format."""
    with wave.open(str(file)) as recording:
        kind = recording.getframerate(), recording.getnchannels(), 8 * recording.getsampwidth()
        if kind != (RATE, 1, 16):
            raise ValueError(
                f"{file} has {kind[0]} samples a second, {kind[1]} channels and {kind[2]} bits; {RATE}, 1, 16"
            )
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
    return samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float32) / 2**15


def detected(session: Session, frames: np.ndarray) -> list[tuple[float, str]]:
    """The detected events, each with its start in seconds."""
    found, before = [], np.zeros(len(EVENTS), bool)
    for number, probabilities in enumerate(session.stream(frames), 1):
        now = np.asarray(probabilities) > THRESHOLD
        found += [(number * FRAME / RATE, EVENTS[event]) for event in np.flatnonzero(now & ~before)]
        before = now
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
