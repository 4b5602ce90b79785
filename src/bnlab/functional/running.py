"""Moving averages of statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["debias", "effective_batches", "moving_average", "updates_to_forget"]


def moving_average(running: Tensor, new: Tensor, momentum: float | Tensor | None, updates: int | Tensor = 1) -> Tensor:
    """Return (1 - a) running + a new: one update of the running statistics.

    Args:
        running: The old value; any shape.
        new: The value of the new batch, same shape. For the variance, this is the unbiased variance.
        momentum: a, the weight of the NEW batch as in torch, which is 1 minus the decay of Keras, Flax and ONNX. None
            stands for 1/updates: the running value is then the plain average of all batches.
        updates: The number of updates including this one. It matters only where momentum is None.

    Returns:
        The new value, in the dtype and shape of `running`. A finite value beyond the range of the dtype becomes its
        largest finite value.

    Source:
        torch.nn.functional.batch_norm, up to one rounding.

    Example:
        >>> moving_average(torch.zeros(1), torch.tensor([150000.0]), 0.1)
        tensor([15000.])
    """
    a = _reciprocal(updates, new) if momentum is None else momentum
    wide = running.to(new.dtype)
    largest = torch.finfo(running.dtype).max
    average = torch.lerp(wide, new, a) if isinstance(a, float) else wide + a * (new - wide)
    return torch.where(average.isfinite(), average.clamp(-largest, largest), average).to(running.dtype)


def _reciprocal(updates: int | Tensor, like: Tensor) -> float | Tensor:
    return updates.to(like.dtype).reciprocal() if isinstance(updates, Tensor) else 1 / updates


def debias(mean: Tensor, var: Tensor, momentum: float, updates: int) -> tuple[Tensor, Tensor]:
    """Remove the share of the initial values 0 and 1 from running statistics.

    mean / (1 - (1-a)^k) and (var - (1-a)^k) / (1 - (1-a)^k). This holds if a never changed and the buffers
    began at 0 and 1.

    Source:
        The geometric series; the bias correction of Adam (Kingma and Ba 2015, section 3) with an initial variance of 1.
    """
    left = (1 - momentum) ** updates
    return mean / (1 - left), (var - left) / (1 - left)


def updates_to_forget(momentum: float, remaining: float = 0.01) -> float:
    """Return the number of updates after which the initial values weigh `remaining`: ln(r)/ln(1 - a).

    Example:
        >>> round(updates_to_forget(0.1), 1)
        43.7
    """
    return math.log(remaining) / math.log1p(-momentum)


def effective_batches(momentum: float) -> float:
    """Return the number of equally weighted batches that a settled moving average is worth: (2 - a)/a.

    The variance of the average is that of a batch statistic times a/(2 - a).

    Example:
        >>> round(effective_batches(0.1), 6)
        19.0
    """
    return (2 - momentum) / momentum
