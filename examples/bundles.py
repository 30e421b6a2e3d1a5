"""Export the trained examples into `examples/repository`, and the model of `unroll doctor`: `make bundles`.

Needs torch. It is equivalent to `unroll export` on the command line, but with realistic example inputs: parity with
PyTorch is proven on inputs that resemble the example.
"""

from pathlib import Path

import numpy as np
import torch

import unroll
from unroll.models import bytes as next_byte
from unroll.models import co2, load, mauna_loa, maze, sound, synthesis
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig

REPOSITORY = Path(__file__).parent / "repository"
DOCTOR = Path(__file__).parents[1] / "service" / "doctor"


def main(repository: Path = REPOSITORY, doctor: Path = DOCTOR) -> None:
    ppm = torch.from_numpy(mauna_loa.read().ppm[:2000]).reshape(4, 500, 1)
    text = torch.tensor([list(Path(__file__).read_bytes()[:256])])
    print(unroll.export(co2.load(), {"ppm": ppm}, name="co2", repository=repository, replace=True))
    model = StackedRNN.load(next_byte.CHECKPOINT)
    print(unroll.export(model, {"x": text}, name="bytes", repository=repository, replace=True))
    frames = torch.from_numpy(synthesis.clip(np.random.default_rng(0)).samples[:48]).reshape(2, 24, -1)
    rates = {"samples": synthesis.RATE}
    print(
        unroll.export(sound.load(), {"samples": frames}, name="sound", rates=rates, repository=repository, replace=True)
    )
    generator = np.random.default_rng(0)
    curves = torch.from_numpy(np.stack([load.curve(generator, 48) for _ in range(2)]))[..., None]
    model = StackedRNN.load(load.CHECKPOINT)
    print(unroll.export(model, {"x": curves}, name="load", repository=repository, replace=True))
    seen = torch.from_numpy(maze.Maze(generator).observations())[None]
    model = StackedRNN.load(maze.CHECKPOINT)
    print(unroll.export(model, {"x": seen}, name="policy", repository=repository, replace=True))
    print(unroll.export(tiny(), {"x": torch.randn(2, 4, 2)}, name="tiny", repository=doctor, replace=True))


def tiny() -> StackedRNN:
    """The model that `unroll doctor` loads on each device: an untrained LSTM with fixed weights."""
    torch.manual_seed(0)
    return StackedRNN(StackedRNNConfig(cell="lstm", hidden_size=4, layers=2, input_size=2, output_size=1)).eval()


if __name__ == "__main__":
    main()
