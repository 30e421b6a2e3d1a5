"""One step of gradient descent, the same in every training."""

import torch
from torch import Tensor, nn

#: Norm of a gradient; those of recurrent models explode now and then (Pascanu et al., 2013, "On the difficulty of
#: training recurrent neural networks").
_MOST_NORM = 1.0


def descend(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Change the parameters against the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _MOST_NORM)
    optimizer.step()
    schedule.step()
