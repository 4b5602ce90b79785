"""The formulas of `bnlab.functional`, for every device, dtype and layout."""

from __future__ import annotations

from torch import Tensor

from bnlab.functional.moments import Moments, batch_moments, sum_of_weights
from bnlab.functional.transform import batch_norm_backward, normalize
from bnlab.kernels.request import Request

__all__ = ["backward", "forward", "refuse"]


def refuse(request: Request) -> str | None:  # noqa: ARG001 - it accepts every request
    """Return None: this backend accepts every request."""
    return None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics: `functional.batch_moments`, then `functional.normalize`."""
    moments = batch_moments(x, mask)
    return normalize(x, moments.mean, moments.var, weight, bias, eps), moments.mean, moments.var


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients: `functional.batch_norm_backward` with the moments of the forward pass."""
    count = mean.new_tensor(x.numel() // max(x.size(1), 1)) if mask is None else sum_of_weights(mask, x)
    moments = Moments(count, mean, var * count.clamp(min=1))
    return batch_norm_backward(grad, x, weight, eps, mask=mask, moments=moments)
