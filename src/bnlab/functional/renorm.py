"""The correction of batch renormalization."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.functional.moments import widened

__all__ = ["renorm_correction"]


def renorm_correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return r and d of x_hat = (x - mu_B)/sigma_B * r + d.

    r = clip(sigma_B/sigma, 1/r_max, r_max), d = clip((mu_B - mu)/sigma, -d_max, d_max), sigma = sqrt(var + eps).

    Args:
        mean: mu_B, the mean of the batch. Shape (C,).
        var: The biased variance of the batch. Shape (C,).
        running_mean: mu, before this batch. Shape (C,).
        running_var: sigma^2 - eps, before this batch. Shape (C,).
        limits: r_max and d_max. Shape (2,).
        eps: Added to both variances.

    Returns:
        r: Shape (C,), float64.
        d: Shape (C,), float64.

    Source:
        Ioffe 2017, "Batch Renormalization", Algorithm 1.

    Example:
        >>> zero, one, limits = torch.zeros(1), torch.ones(1), torch.tensor([3.0, 5.0])
        >>> renorm_correction(one, 4 * one, zero, one, limits, 0.0)
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    std, running_std = (widened(var) + eps).sqrt(), (widened(running_var) + eps).sqrt()
    r_max, d_max = widened(limits)
    d = (widened(mean) - widened(running_mean)) / running_std
    return torch.clamp(std / running_std, 1 / r_max, r_max), torch.clamp(d, -d_max, d_max)
