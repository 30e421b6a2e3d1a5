"""Train the forecaster of processor load on synthetic curves, or measure it on held-out ones.

python -m unroll.models.training.load              train (half a minute on an idle core), save, measure
python -m unroll.models.training.load --evaluate   measure the checkpoint only
"""

import argparse

import numpy as np
import torch
from torch.nn.functional import smooth_l1_loss

from unroll.models import load
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig
from unroll.models.training.descent import descend

SEED, HELD_OUT_SEED = 1, 2
STEPS, BATCH, READINGS = 700, 32, 64
#: The first forecasts, which are not scored: the model knows too little about the machine.
WARM_UP = 30
CONFIG = StackedRNNConfig(cell="gru", input_size=1, hidden_size=24, layers=1, output_size=1)


def train() -> StackedRNN:
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    model = StackedRNN(CONFIG).train()
    with torch.no_grad():
        model.rnn.weight_ih_l0 *= 10  # loads are small numbers, which would hardly affect the gates
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(1, STEPS + 1):
        x = batch(generator, BATCH)
        loss = smooth_l1_loss(model(x[:, :-1]), x[:, 1:], beta=0.02)
        descend(model, loss, optimizer, schedule)
        if step % 100 == 0:
            print(f"{step}/{STEPS}: loss {loss.item():.5f}", flush=True)
    return model.eval()


def batch(generator: np.random.Generator, curves: int) -> torch.Tensor:
    """A batch of curves, (curves, READINGS, 1)."""
    return torch.from_numpy(np.stack([load.curve(generator, READINGS) for _ in range(curves)]))[..., None]


@torch.inference_mode()
def evaluate(model: StackedRNN, curves: int = 200) -> tuple[float, float]:
    """The mean error on held-out curves: of the forecasts, and of the last reading used as a forecast."""
    x = batch(np.random.default_rng(HELD_OUT_SEED), curves)
    following = x[:, WARM_UP + 1 :]
    forecast, last = model(x)[:, WARM_UP:-1], x[:, WARM_UP:-1]
    return (forecast - following).abs().mean().item(), (last - following).abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unroll.models.training.load", description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint, do not train")
    arguments = parser.parse_args()
    # One thread makes sums reproducible on a machine, and leaves the other cores free.
    torch.set_num_threads(1)
    if not arguments.evaluate:
        train().save(load.CHECKPOINT)
    error, naive = evaluate(StackedRNN.load(load.CHECKPOINT))
    print(f"mean error on held-out curves: {error:.4f}; of the last reading as a forecast: {naive:.4f}")


if __name__ == "__main__":
    main()
