"""torch's operators on a GPU, called on input that is shifted to a mean near 0 and scaled by a power of two.

torch's own BN is off by thousands of eps on a GPU where the mean is large, because it rounds the mean to float32 and
sums squares around that. Here float32 holds deviations from a pivot near the mean, and everything per channel is
float64.

Nothing waits for the device: what the host would decide by the values, such as the scale, stays in tensors. No Python
number becomes a tensor either, because its copy to the device waits (torch.where does that; masked_fill_ does not).

Every operator here gives the same bits in every run. On CUDA a reduction ends in a fixed order
(aten/src/ATen/native/cuda/Reduce.cuh of torch 2.13), and a thread sums up to 256 values in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnlab.functional.moments import per_channel, widened

__all__ = ["backward", "forward"]

_PART = 1 << 23
"""Values that are shifted at once. Their 32 MiB of float32 stay in the cache of a large GPU between two kernels."""

_FAR = 2.0**80
"""A channel whose mean square is larger, or smaller than its reciprocal, is scaled: float32 could not hold sums of
squares. The scale is the reciprocal or `_FAR`. It is a power of two, and no rounding comes of it."""


class _Shift(NamedTuple):
    """The map from x to (x - pivot) * scale, which is what float32 holds.

    Attributes:
        pivot: Near the mean of the channel. Shape (C,), float32.
        scale: A power of two. Shape (C,), float32.
        offset: -pivot * scale, which is exact. Shape (C,), float32.
    """

    pivot: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def to(cls, pivot: Tensor, scale: Tensor) -> _Shift:
        """Return the shift to a pivot, in units of 1/scale."""
        return cls(pivot, scale, pivot.neg().mul_(scale))

    def of(self, part: Tensor) -> Tensor:
        """Return a part of the batch in float32. x * scale is exact, and the difference is rounded once."""
        return torch.addcmul(per_channel(self.offset, part), part, per_channel(self.scale, part))


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64.

    Besides y this takes 32 MiB, or one sample in float32 where that is larger.

    Args:
        x: Shape (N, C, *spatial), two values per channel or more; float32, bfloat16 or float16.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        eps: Added to the variance.
    """
    shift = _shift_to_the_mean(x)
    rest, spread = _shifted_moments(x, shift)
    scale = widened(shift.scale)
    mean = rest / scale + shift.pivot
    var = spread / scale.square()
    slope = (var + eps).rsqrt() / scale
    slope = slope if weight is None else slope * weight
    start = rest.neg() * slope
    start = start if bias is None else start + bias
    slope, start = (per_channel(values.to(torch.float32), x) for values in (slope, start))
    y = torch.empty_like(x)
    for part, out in zip(_parts(x), _parts(y), strict=True):
        torch.addcmul(start, shift.of(part), slope, out=out)
    return y, mean, var


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float64, in as much memory as `forward` takes.

    With s = (x - pivot) * scale, x_hat = (s - rest) * slope, and dx = a dy + b s + c with a = gamma r,
    b = -a slope dgamma/m and c = -a dbeta/m - b rest, which are the terms of `functional.batch_norm_backward`.
    """
    shift = _Shift.to(mean.to(torch.float32), _scale(var + mean.square()))
    scale = widened(shift.scale)
    rest = (mean - shift.pivot) * scale
    inv_std = (var + eps).rsqrt()
    slope = inv_std / scale
    dbeta, product = _sums(grad, x, shift)
    dgamma = (product - rest * dbeta) * slope
    count = x.numel() // x.size(1)
    a = inv_std if weight is None else inv_std * weight
    b = a * slope * dgamma / -count
    c = a * dbeta / -count - b * rest
    a, b, c = (per_channel(values.to(torch.float32), x) for values in (a, b, c))
    dx = torch.empty_like(x)
    for part, dy, out in zip(_parts(x), _parts(grad), _parts(dx), strict=True):
        torch.addcmul(_line(shift.of(part), b, c), dy, a, out=out)
    return dx, dgamma, dbeta


def _shift_to_the_mean(x: Tensor) -> _Shift:
    """Return the shift to the mean of the whole batch, which no outlier and no order of the batch keeps far away.

    The mean is rounded to the dtype of `x`. No value of that dtype is nearer to the true mean, so that the distance is
    at most one standard deviation. Welford's update of a mean does not overflow where a sum would.
    """
    var, mean = torch.var_mean(x, _reduced(x), correction=0)
    pivot = mean.to(torch.float32)
    if x.dtype is torch.float16:  # its range needs no scale, and is too small for the variance
        return _Shift.to(pivot, torch.ones_like(pivot))
    return _Shift.to(pivot, _scale(torch.addcmul(var.to(torch.float32), pivot, pivot)))


def _scale(mean_square: Tensor) -> Tensor:
    """Return the powers of two that bring channels into the range in which float32 holds sums of squares."""
    scale = torch.ones_like(mean_square, dtype=torch.float32)
    scale.masked_fill_(mean_square < 1 / _FAR, _FAR)
    return scale.masked_fill_(mean_square >= _FAR, 1 / _FAR)


def _shifted_moments(x: Tensor, shift: _Shift) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the shifted batch in float64, merged from those of its parts in float32.

    The parts merge at once, by the law of total variance: pair by pair each would take ten kernels of its own.
    """
    parts = _parts(x)
    pairs = [torch.var_mean(shift.of(part), _reduced(x), correction=0) for part in parts]
    if len(pairs) == 1:
        return widened(pairs[0][1]), widened(pairs[0][0])
    variances, means = (widened(torch.stack(values)) for values in zip(*pairs, strict=True))
    share = means.new_full((len(parts), 1), parts[0].size(0) / x.size(0))
    share[-1].fill_(parts[-1].size(0) / x.size(0))
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _sums(grad: Tensor, x: Tensor, shift: _Shift) -> tuple[Tensor, Tensor]:
    """Return sum dy and sum dy s over the shifted batch in float64, added up from float32 sums of its parts."""
    totals, products = [], []
    for part, dy in zip(_parts(x), _parts(grad), strict=True):
        totals.append(dy.sum(_reduced(x), dtype=torch.float32))
        products.append(shift.of(part).mul_(dy).sum(_reduced(x)))
    total, product = widened(torch.stack(totals + products)).reshape(2, -1, x.size(1)).sum(1)
    return total, product


def _line(values: Tensor, slope: Tensor, start: Tensor) -> Tensor:
    """Return values * slope + start in the memory of the values."""
    return torch.addcmul(start, values, slope, out=values)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Return the samples in parts of at most `_PART` values, or of one sample."""
    return torch.split(x, max(1, _PART // (x.numel() // x.size(0))))


def _reduced(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
