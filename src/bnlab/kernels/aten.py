"""torch's own CPU kernels on input that is shifted to a mean near 0 and made contiguous.

As torch calls them they miss the numeric policy: they fold the mean into y = a*x + b, which cancels where it is large,
and in channels_last add up thousands of values in one float32. On shifted, contiguous input neither happens.
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

_SAMPLE = 1024
"""Values per channel whose mean is subtracted: few enough that torch never splits the sum between threads."""

_FAR = 2.0
"""Standard deviations the sample's mean may be off before the input is shifted again."""

_SMALLEST_VARIANCE = 1e-30
"""Squares of smaller deviations are denormal in float32; an exact 0, a constant channel, goes the same way."""


def refuse(request: Request) -> str | None:
    """Return why torch's kernels cannot be used for a request, or None."""
    if request.device != "cpu":
        return f"its accuracy on {request.device} has not been measured"
    if request.masked:
        return "it knows no mask"
    if request.dtype not in ("float32", "float16", "bfloat16"):
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
    pivot = _sample_mean(x)
    shifted = _shift(x, pivot)
    rest, var = torch.ops.aten.batch_norm_update_stats(shifted, None, None, 0.0)
    if not _is_in_range(var):
        return reference.forward(x, weight, bias, mask, eps)
    var = var.to(torch.float64)
    mean = pivot.to(torch.float64) + rest
    if bool((rest.square() > _FAR**2 * var).any()):
        shifted -= per_channel(rest, x)
        rest = torch.zeros_like(rest)
    alpha = (var + eps).rsqrt()
    alpha = alpha if weight is None else alpha * weight
    beta = -rest * alpha
    beta = beta if bias is None else beta + bias
    y = torch.addcmul(per_channel(beta.to(torch.float32), x), shifted, per_channel(alpha.to(torch.float32), x))
    return y.to(x.dtype), mean, var


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float32."""
    if not _is_in_range(var):
        return reference.backward(grad, x, weight, mask, mean, var, eps)
    pivot = mean.to(torch.float32)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        grad.to(torch.float32).contiguous(),
        _shift(x, pivot),
        torch.ones_like(pivot) if weight is None else weight.to(torch.float32),
        None,
        None,
        (mean - pivot).to(torch.float32),
        (var + eps).rsqrt().to(torch.float32),
        True,
        eps,
        [True, True, True],
    )
    return dx.to(x.dtype), dgamma, dbeta


def _sample_mean(x: Tensor) -> Tensor:
    """Return the mean of the first values of each channel, float32: near the mean unless the batch is sorted."""
    first, room = x, _SAMPLE
    for dim in range(x.dim() - 1, -1, -1):
        if dim != 1:
            first = first.narrow(dim, 0, min(first.size(dim), room))
            room = max(1, room // first.size(dim))
    return first.mean([0, *range(2, x.dim())], dtype=torch.float32)


def _shift(x: Tensor, pivot: Tensor) -> Tensor:
    """Return x - pivot in float32, contiguous."""
    return (x.to(torch.float32) - per_channel(pivot, x)).contiguous()


def _is_in_range(var: Tensor) -> bool:
    smallest, largest = torch.aminmax(var)
    return float(smallest) >= _SMALLEST_VARIANCE and float(largest) < torch.finfo(torch.float32).max
