"""Train the maze policy to imitate a controller that knows the way, or measure it on held-out mazes.

python -m unroll.models.training.policy              train (ten seconds on an idle core), save, measure
python -m unroll.models.training.policy --evaluate   measure the checkpoint only
"""

import argparse

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from unroll.models.maze import CHECKPOINT, LONGEST, Maze
from unroll.models.stacked_rnn import StackedRNN, StackedRNNConfig
from unroll.models.training.descent import descend

SEED, HELD_OUT_SEED = 1, 2
STEPS, BATCH = 400, 32
#: The longest way out: two signs, two corridors, two junctions.
PLACES = 2 * (LONGEST + 2)
#: The label after the end of a way, ignored in training.
ENDED = -1
CONFIG = StackedRNNConfig(cell="gru", input_size=3, hidden_size=24, layers=1, output_size=3)


def train() -> StackedRNN:
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    model = StackedRNN(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    # Turns count more, since most places are corridors.
    weight = torch.tensor([1.0, 5.0, 5.0])
    for step in range(1, STEPS + 1):
        observations, actions = batch(generator, BATCH)
        logits = model(observations)
        loss = cross_entropy(logits.flatten(0, 1), actions.flatten(), weight, ignore_index=ENDED)
        descend(model, loss, optimizer, schedule)
        if step % 100 == 0:
            print(f"{step}/{STEPS}: cross entropy {loss.item():.5f}", flush=True)
    return model.eval()


def batch(generator: np.random.Generator, mazes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations (mazes, PLACES, 3) on the way out, and the controller's actions (mazes, PLACES)."""
    observations = np.zeros((mazes, PLACES, 3), np.float32)
    actions = np.full((mazes, PLACES), ENDED, np.int64)
    for row in range(mazes):
        maze = Maze(generator)
        observations[row, : len(maze.right_actions)] = maze.observations()
        actions[row, : len(maze.right_actions)] = maze.right_actions
    return torch.from_numpy(observations), torch.from_numpy(actions)


@torch.inference_mode()
def evaluate(model: StackedRNN, mazes: int = 1000) -> tuple[float, float]:
    """The share of held-out mazes that the policy solves: with its state, and with a zero state at each step."""
    observations, actions = batch(np.random.default_rng(HELD_OUT_SEED), mazes)
    forgetful = model(observations.flatten(0, 1)[:, None]).unflatten(0, actions.shape).squeeze(2)
    shares = []
    for logits in (model(observations), forgetful):
        right = (logits.argmax(-1) == actions) | (actions == ENDED)
        shares.append(right.all(1).float().mean().item())
    return shares[0], shares[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unroll.models.training.policy", description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint, do not train")
    arguments = parser.parse_args()
    # One thread makes sums reproducible on a machine, and leaves the other cores free.
    torch.set_num_threads(1)
    if not arguments.evaluate:
        train().save(CHECKPOINT)
    remembering, forgetful = evaluate(StackedRNN.load(CHECKPOINT))
    print(f"held-out mazes left: {remembering:.1%}; with the state thrown away at each step: {forgetful:.1%}")


if __name__ == "__main__":
    main()
