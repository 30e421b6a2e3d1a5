"""Train the sound detector on synthesised clips, or measure it on held-out ones.

python -m unroll.models.training.sound              train (two minutes on an idle core), save, measure
python -m unroll.models.training.sound --evaluate   measure the checkpoint only
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy

from unroll.models import checkpoint, synthesis
from unroll.models.sound import CHECKPOINT, EVENTS, SoundDetector, load
from unroll.models.training.descent import descend

SEED, HELD_OUT_SEED = 1, 2
STEPS, BATCH = 500, 16
LEARNING_RATE, WARM_UP = 1e-2, 40
#: Frames with an event count more: most frames have none, and double claps are rare and short.
WEIGHTS = torch.tensor([2.0, 10.0, 2.0])
#: An event is detected where its probability exceeds this.
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one event, over the judged frames of held-out clips."""

    found: float  # detected share of the frames with the event
    false: float  # detected share of the frames without it


def train() -> SoundDetector:
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    model = SoundDetector().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate)
    total = 0.0
    for step in range(1, STEPS + 1):
        samples, present, judged = batch(generator, BATCH)
        loss = binary_cross_entropy(model(samples), present, judged * (1 + present * (WEIGHTS - 1)))
        descend(model, loss, optimizer, schedule)
        total += loss.item()
        if step % 100 == 0:
            print(f"{step}/{STEPS}: cross entropy {total / 100:.4f}", flush=True)
            total = 0.0
    return model.eval()


def _learning_rate(step: int) -> float:
    """The factor on the peak rate: a linear warm-up, then a half cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def batch(generator: np.random.Generator, clips: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of clips: samples (clips, frames, 256), and `present` and `judged` (clips, frames, 3)."""
    made = [synthesis.clip(generator) for _ in range(clips)]
    samples, present, judged = (
        torch.from_numpy(np.stack([getattr(clip, name) for clip in made])) for name in ("samples", "present", "judged")
    )
    return samples, present, judged


@torch.inference_mode()
def evaluate(model: SoundDetector, clips: int = 200) -> dict[str, Score]:
    samples, present, judged = batch(np.random.default_rng(HELD_OUT_SEED), clips)
    detected = model(samples) > THRESHOLD
    scores = {}
    for event, name in enumerate(EVENTS):
        found, there = (tensor[..., event][judged[..., event]] for tensor in (detected, present > 0))
        scores[name] = Score(found[there].float().mean().item(), found[~there].float().mean().item())
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unroll.models.training.sound", description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint, do not train")
    arguments = parser.parse_args()
    # One thread makes sums reproducible on a machine, and leaves the other cores free.
    torch.set_num_threads(1)
    if not arguments.evaluate:
        model = train()
        checkpoint.write(CHECKPOINT, model, model.rnn.config)
    print("held-out clips   frames found   false alarms")
    for name, score in evaluate(load()).items():
        print(f"{name:<17}{score.found:>12.1%}{score.false:>15.2%}")


if __name__ == "__main__":
    main()
