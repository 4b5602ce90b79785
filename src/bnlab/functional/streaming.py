"""The moments of values that arrive in blocks, and the formula that merges blocks."""

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
    """Return the count, mean and m2 of two blocks together.

    The result is exact in any order, also for counts that are sums of weights.

    n = n_a + n_b, mu = mu_a + d n_b/n, M2 = M2_a + M2_b + d^2 n_a n_b/n with d = mu_b - mu_a.

    Args:
        count: Values per channel of one block, or the sum of their weights, >= 0.
        mean: The mean of this block; any shape, float64.
        m2: The sum of squared deviations of this block from its mean; the shape of `mean`.
        more_count: Values per channel of the other block.
        more_mean: The mean of the other block.
        more_m2: The sum of squared deviations of the other block.

    Source:
        Chan, Golub and LeVeque 1983, equation 2.1.
    """
    together = count + more_count
    total = together + (together == 0)  # avoids 0/0: two empty blocks make an empty one
    difference = more_mean - mean
    share = more_count / total
    return together, mean + difference * share, m2 + more_m2 + difference * (difference * (count * share))


class StreamingMoments(Generic[Array]):
    """The count, mean and variance of values that arrive block by block, in float64.

    The memory is that of the mean of one block. Blocks are numpy arrays or tensors, but not both.

    Args:
        zeros: Zeros in the shape of one value, such as (C,), float64: a numpy array or a tensor.

    Attributes:
        count: The number of values so far, or the sum of their weights.
        mean: The mean of these values; the shape of `zeros`, input units.
        m2: The sum of squared deviations from the mean; the shape of `zeros`, squared input units.

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
        """Add a block.

        Args:
            count: The number of values in the block, or the sum of their weights, >= 0.
            mean: The mean of the block.
            m2: The sum of squared deviations of the block from its mean. None stands for 0: `mean` is then a single
                value of weight `count`.
        """
        more_m2: Array = self.m2 * 0 if m2 is None else m2
        self.count, self.mean, self.m2 = merged_moments(self.count, self.mean, self.m2, float(count), mean, more_m2)

    def add_rows(self, rows: Array) -> None:
        """Add K values of weight 1, stacked along dimension 0: shape (K, *shape of one value)."""
        if not len(rows):
            return
        deviations: Array = rows - self.mean
        mean: Array = deviations.mean(0)
        self.add(float(len(rows)), self.mean + mean, ((deviations - mean) ** 2).sum(0))

    @property
    def var(self) -> Array:
        """Biased variance m2/count; 0 before the first block."""
        return self.m2 / (self.count or 1.0)

    @property
    def unbiased_var(self) -> Array:
        """Unbiased variance m2/(count - 1); 0 for fewer than two values."""
        return self.m2 / max(self.count - 1, 1.0)
