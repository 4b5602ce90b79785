"""The moments of a batch, and how they merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from bnlab.functional.streaming import merged_moments

__all__ = [
    "Moments",
    "arithmetic_dtype",
    "batch_moments",
    "channel_sum",
    "merge",
    "moments_in_blocks",
    "per_channel",
    "population_moments",
    "position_weights",
    "sum_of_weights",
    "widened",
    "without_padding_garbage",
]

_BLOCK = 1 << 21
"""Number of values that are widened to float64 at once."""


@dataclass(frozen=True)
class Moments:
    """The count, mean and sum of squared deviations of each channel.

    Attributes:
        count: Values per channel, N*prod(spatial), or the sum of their weights. Shape (), float64.
        mean: Shape (C,), float64, input units.
        m2: Sum of squared deviations from the mean. Shape (C,), float64, squared input units.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance m2/count, with which Algorithm 1 normalises. Shape (C,)."""
        return self.m2 / self.count.clamp(min=1)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance m2/(count - 1), which torch's running_var averages. Shape (C,); 0 for a count of 1."""
        return self.m2 / (self.count - 1).clamp(min=1)


def widened(x: Tensor) -> Tensor:
    """Return `x` in float64, where the square of any float32 is finite, or in float32 on devices without float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a transform of `x` is computed: float64 for float64, and float32 for everything else.

    torch.promote_types would become a node of every exported graph.
    """
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View values of shape (C,) so that they broadcast along dimension 1 of `x`."""
    return values.reshape(1, -1, *([1] * (x.dim() - 2)))


def channel_sum(values: Tensor) -> Tensor:
    """Sum over every dimension except the channels, in an order that does not depend on the number of threads.

    torch splits a sum over several channels between threads by channel, but a sum to a single number at any place. This
    function therefore sums a single channel in 64 fixed parts.

    Args:
        values: Shape (N, C, *spatial).

    Returns:
        Shape (C,).
    """
    if values.size(1) != 1:
        return values.sum([0, *range(2, values.dim())])
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).reshape(64, -1).sum(1).sum(0, keepdim=True)


def position_weights(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask as weights of shape (N, 1, *spatial), float64."""
    return widened(mask).expand(x.size(0), 1, *x.shape[2:])


def sum_of_weights(mask: Tensor, x: Tensor) -> Tensor:
    """Return the number of values per channel under a mask: the sum of its weights. Shape (), float64."""
    return channel_sum(position_weights(mask, x)).squeeze(0)


def batch_moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Return the moments of every channel over a batch, in two passes.

    mu = 1/m sum x_i, m2 = sum (x_i - mu)^2 - (sum (x_i - mu))^2 / m; the second term only corrects rounding errors.

    Args:
        x: Activations. Shape (N, C, *spatial); any float dtype and layout.
        mask: Weight of every position, >= 0; 0 or False for padding, whose values are ignored and may be NaN.
            Broadcasts to (N, 1, *spatial).

    Returns:
        The moments. An empty batch has count 0, mean 0 and m2 0.

    Source:
        Ioffe and Szegedy 2015, Algorithm 1; Chan, Golub and LeVeque 1983 for the corrected second pass.

    Example:
        >>> batch_moments(torch.tensor([[1e5], [2e5]])).var
        tensor([2.5000e+09], dtype=torch.float64)
    """
    values = widened(x)
    if mask is None:
        count = values.new_tensor(x.numel() // max(x.size(1), 1))
        mean = channel_sum(values) / count.clamp(min=1)
        deviation = values - per_channel(mean, x)
        m2 = channel_sum(deviation.square()) - channel_sum(deviation).square() / count.clamp(min=1)
    else:
        weights = position_weights(mask, x)
        values = torch.where(weights > 0, values, 0)
        count = sum_of_weights(mask, x)
        total = torch.where(count > 0, count, 1)
        mean = channel_sum(weights * values) / total
        deviation = torch.where(weights > 0, values - per_channel(mean, x), 0)
        m2 = channel_sum(weights * deviation.square()) - channel_sum(weights * deviation).square() / total
    return Moments(count, mean, m2.clamp(min=0))


def moments_in_blocks(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Return the moments of every channel over a batch, of which only a part is widened to float64 at once.

    Args:
        x: As for `batch_moments`.
        mask: As for `batch_moments`, of shape (N, 1, *spatial).
    """
    rows = max(1, _BLOCK // max(1, x.numel() // max(1, x.size(0))))
    masks = repeat(None) if mask is None else torch.split(mask, rows)
    return reduce(merge, map(batch_moments, torch.split(x, rows), masks))


def without_padding_garbage(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with 0 where the mask is 0 and the value is not finite, to keep padding out of the gradients."""
    return torch.where((mask > 0) | torch.isfinite(x), x, 0)


def merge(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two batches. The result is exact in any order.

    n = n_a + n_b, mu = mu_a + d n_b/n, M2 = M2_a + M2_b + d^2 n_a n_b/n with d = mu_b - mu_a.

    Source:
        Chan, Golub and LeVeque 1983, equation 2.1.
    """
    return Moments(*merged_moments(a.count, a.mean, a.m2, b.count, b.mean, b.m2))


def population_moments(
    batches: Iterable[Moments], estimator: Literal["population", "within-batch"] = "population"
) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of the population of the mini-batches, with which Algorithm 2 does inference.

    Args:
        batches: Moments of the mini-batches, each with a count of at least 1.
        estimator: "population" pools the moments exactly, by the law of total variance. "within-batch" averages the
            means and unbiased variances of the batches, each weighted by its count. For batches of one size this is
            the paper's E[x] = E_B[mu_B], Var[x] = m/(m-1) E_B[sigma_B^2]. torch's running statistics estimate it, and
            it leaves out the variance between batches.

    Returns:
        The mean and the unbiased variance, each of shape (C,), float64.

    Source:
        Ioffe and Szegedy 2015, Algorithm 2; Wu and Johnson 2021, appendix A.2.
    """
    all_ = list(batches)
    pooled = reduce(merge, all_)
    if estimator == "population":
        return pooled.mean, pooled.unbiased_var
    weighted = torch.stack([batch.unbiased_var * batch.count for batch in all_]).sum(0)
    return pooled.mean, weighted / pooled.count
