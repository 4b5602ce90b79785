"""torch's own CPU kernels, where they meet the numeric policy: on a contiguous input shifted by its mean.

Unshifted they fold the mean into y = a*x + b, which cancels; in channels_last they add up thousands of values in one
float32. Subtracting a mean that float32 can hold is exact where it matters, and leaves them numbers near 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnlab.functional.moments import per_channel
from bnlab.kernels import reference

if TYPE_CHECKING:
    from bnlab.kernels.choose import Request

__all__ = ["backward", "forward", "refuse"]

_HALVES = ("float16", "bfloat16")


def refuse(request: Request) -> str | None:
    """Return why torch's kernels cannot be used for a request, or None."""
    if request.device != "cpu":
        return f"its accuracy on {request.device} has not been measured"
    if request.masked:
        return "it knows no mask"
    if request.layout != "contiguous":
        return f"in {request.layout} layout it misses 4 eps even at mean 0"
    if request.dtype not in ("float32", *_HALVES):
        return f"it keeps statistics of {request.dtype} in {request.dtype}"
    if request.count < 2:
        return "there is nothing to reduce"
    return None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64.

    A batch whose float32 variance is not finite, because it overflowed or because the input is not, goes to the
    reference, in which the square of any float32 is finite.
    """
    dims = [0, *range(2, x.dim())]
    wide = x.to(torch.float32)
    pivot = wide.mean(dims)
    shifted = wide - per_channel(pivot, x)
    rest, var = torch.ops.aten.batch_norm_update_stats(shifted, None, None, 0.0)
    total = float(var.sum())
    if not total < torch.finfo(torch.float32).max or float(var.amin()) < _SMALLEST_VARIANCE:
        return reference.forward(x, weight, bias, mask, eps)
    var64 = var.to(torch.float64)
    alpha = (var64 + eps).rsqrt()
    if weight is not None:
        alpha = alpha * weight
    beta = -rest * alpha
    if bias is not None:
        beta = beta + bias
    y = torch.addcmul(per_channel(beta.to(torch.float32), x), shifted, per_channel(alpha.to(torch.float32), x))
    return y.to(x.dtype), pivot.to(torch.float64) + rest, var64


_SMALLEST_VARIANCE = 1e-30
"""Squares of smaller deviations are denormal in float32; an exact 0, a constant channel, goes the same way."""


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float32."""
    inv_std = (var + eps).rsqrt()
    limits = torch.finfo(torch.float32)
    if not bool(((var < limits.max) & (var >= _SMALLEST_VARIANCE)).all()):
        return reference.backward(grad, x, weight, mask, mean, var, eps)
    pivot = mean.to(torch.float32)
    shifted = x.to(torch.float32) - per_channel(pivot, x)
    gamma = None if weight is None else weight.to(torch.float32)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        grad.to(torch.float32).contiguous(),
        shifted,
        gamma if gamma is not None else torch.ones_like(pivot),
        None,
        None,
        (mean - pivot).to(torch.float32),
        inv_std.to(torch.float32),
        True,
        eps,
        [True, True, True],
    )
    return dx.to(x.dtype), dgamma, dbeta
