"""Moments of values that arrive in blocks, and the one formula by which blocks merge."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["StreamingMoments", "merged_moments"]

Array = TypeVar("Array", Tensor, NDArray[np.float64])
Count = TypeVar("Count", float, Tensor)


def merged_moments(
    count: Count, mean: Array, m2: Array, more_count: Count, more_mean: Array, more_m2: Array
) -> tuple[Count, Array, Array]:
    """Return count, mean and m2 of two blocks together: exact, in any order, for counts that are weights too.

    n = n_a + n_b, mu = mu_a + d n_b/n, M2 = M2_a + M2_b + d^2 n_a n_b/n with d = mu_b - mu_a.

    Args:
        count: Values per channel of one block, or the sum of their weights, >= 0.
        mean: Its mean; any shape, float64.
        m2: Its sum of squared deviations from the mean; the shape of `mean`.
        more_count: Values per channel of the other block.
        more_mean: Its mean.
        more_m2: Its sum of squared deviations.

    Source:
        Chan, Golub and LeVeque 1983, equation 2.1.
    """
    together = count + more_count
    total = together + (together == 0)  # two empty blocks are an empty one
    difference = more_mean - mean
    share = more_count / total
    return together, mean + difference * share, m2 + more_m2 + difference * (difference * (count * share))


class StreamingMoments(Generic[Array]):
    """Count, mean and variance of what arrives block by block, in float64 and in the memory of one block's mean.

    Arrays of numpy and tensors are both taken, but not mixed.

    Args:
        zeros: Zeros in the shape of one value, such as (C,), float64: an array of numpy or a tensor.

    Attributes:
        count: Values so far, or the sum of their weights.
        mean: Their mean; the shape of `zeros`, input units.
        m2: Sum of squared deviations from the mean; the shape of `zeros`, squared input units.

    Source:
        Chan, Golub and LeVeque 1983, equation 2.1.

    Example:
        >>> import numpy as np
        >>> moments = StreamingMoments(np.zeros(1))
        >>> moments.add(2, np.array([1.0]), np.array([2.0]))  # the values 0 and 2
        >>> moments.add(1, np.array([4.0]))
        >>> moments.mean, moments.unbiased_var
        (array([2.]), array([4.]))
    """

    def __init__(self, zeros: Array) -> None:
        self.count = 0.0
        self.mean: Array = zeros
        self.m2: Array = zeros

    def add(self, count: float, mean: Array, m2: Array | None = None) -> None:
        """Take in a block.

        Args:
            count: Values in the block, or the sum of their weights, >= 0.
            mean: Their mean.
            m2: Sum of their squared deviations from the mean; 0 if None, which makes `mean` one value with a weight.
        """
        more_m2: Array = self.m2 * 0 if m2 is None else m2
        self.count, self.mean, self.m2 = merged_moments(self.count, self.mean, self.m2, float(count), mean, more_m2)

    def add_rows(self, rows: Array) -> None:
        """Take in values one below the other, of the shape (K, *shape of one value), each with the weight 1."""
        if not len(rows):
            return
        deviations: Array = rows - self.mean
        mean: Array = deviations.mean(0)
        self.add(float(len(rows)), self.mean + mean, ((deviations - mean) ** 2).sum(0))

    @property
    def var(self) -> Array:
        """Biased variance m2/count; 0 where there is nothing yet."""
        return self.m2 / (self.count or 1.0)

    @property
    def unbiased_var(self) -> Array:
        """Unbiased variance m2/(count - 1); 0 for fewer than two values."""
        return self.m2 / max(self.count - 1, 1.0)
