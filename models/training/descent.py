"""One step of gradient descent, shared by all training commands."""

import torch
from torch import Tensor, nn

#: The largest gradient norm: gradients of recurrent models occasionally explode (Pascanu et al., 2013, "On the
#: difficulty of training recurrent neural networks").
_MOST_NORM = 1.0


def descend(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Update the parameters by one step."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _MOST_NORM)
    optimizer.step()
    schedule.step()
