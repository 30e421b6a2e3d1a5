"""A policy finds its way out of mazes. The server holds its memory: one session per episode, all on one stream.

python -m unroll.examples.policy              64 episodes, eight at a time
python -m unroll.examples.policy --forget     the same episodes, with a new session for each step

Needs a server for `examples/repository`, such as that of `make run`, but no torch.
"""

import argparse
import sys

import numpy as np

from unroll.client import Client, Stream, StreamSession, errors
from unroll.models.maze import Maze


def main(argv: list[str]) -> int:
    """Run the example. Returns 0, or 1 without a server."""
    options = _parser().parse_args(argv)
    generator = np.random.default_rng(options.seed)
    mazes = [Maze(generator) for _ in range(options.episodes)]
    try:
        with Client(options.url) as client, client.stream("policy") as stream:
            steps = play(stream, mazes, options.at_once, forget=options.forget)
    except (errors.UnrollError, OSError, ValueError) as error:
        print(f"unroll.examples.policy: {error}", file=sys.stderr)
        return 1
    print(f"{sum(maze.outcome == 'out' for maze in mazes)} of {len(mazes)} mazes left, in {steps} steps")
    return 0


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m unroll.examples.policy", description=description)
    parser.add_argument("--episodes", type=_positive, default=64, help="how many mazes (default: %(default)s)")
    parser.add_argument("--at-once", type=_positive, default=8, help="episodes at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mazes (default: %(default)s)")
    parser.add_argument("--forget", action="store_true", help="throw the hidden state away after each step")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def play(stream: Stream, mazes: list[Maze], at_once: int, *, forget: bool) -> int:
    """Play each maze to its end. Returns the number of steps."""
    waiting, steps = list(mazes), 0
    playing: list[Maze] = []
    sessions: list[StreamSession] = []
    while waiting or playing:
        new = waiting[: at_once - len(playing)]
        del waiting[: len(new)]
        if new:
            playing += new
            sessions += stream.open(len(new))
        logits = stream.step(sessions, np.stack([maze.observe() for maze in playing]))
        steps += len(playing)
        for maze, action in zip(playing, np.asarray(logits).argmax(-1), strict=True):
            maze.act(int(action))
        # To reset the hidden state, open a new session.
        lasting = [maze.outcome is None for maze in playing]
        stream.close([session for session, lasts in zip(sessions, lasting, strict=True) if forget or not lasts])
        playing = [maze for maze, lasts in zip(playing, lasting, strict=True) if lasts]
        if forget:
            sessions = stream.open(len(playing)) if playing else []
        else:
            sessions = [session for session, lasts in zip(sessions, lasting, strict=True) if lasts]
    return steps


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
