"""Standard errors of a pooled mean and variance, from the differences between the batches.

The unit is a batch: the samples of a batch depend on each other through the BN layers before this one, and the
positions of an image are alike. A standard error that counts positions would be far too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bnlab.observe.evidence import Floats

__all__ = ["BatchTotals", "MomentErrors", "StandardError"]

_NORMAL = 1.959964
"""Number of standard errors within which 95 % of normal errors lie."""

_FEWEST = 0.5
"""Degrees of freedom below which nothing is known: one batch, or one that is far larger than all others."""


@dataclass(frozen=True, kw_only=True)
class StandardError:
    """The largest standard error of a layer.

    Attributes:
        value: In standard deviations, sqrt(var + eps): that of the mean, or half the relative one of the variance.
        channel: The channel that has it.
        of: "mean" or "variance".
    """

    value: float
    channel: int
    of: str


@dataclass(frozen=True, kw_only=True, eq=False)
class MomentErrors:
    """Standard errors of the pooled statistics of a layer. Arrays have the shape (C,), float64.

    1.96 of them cover 95 % of the errors, also for few batches: they contain the factor of Student's distribution.

    Attributes:
        batches: Batches in which the layer ran.
        mean: Of the mean, input units.
        population_var: Of the variance of all values, squared input units.
        within_var: Of the mean of the batch variances, squared input units.
    """

    batches: int
    mean: Floats
    population_var: Floats
    within_var: Floats

    def largest(self, var: Floats, var_error: Floats, eps: float) -> StandardError:
        """Return the largest, over channels, of the errors of mean/std and ln(var)/2.

        Both are what a normalised output is off by, in its standard deviations: (mean - true mean)/std, and std/(true
        std) - 1. The variance is var + eps, by whose root the layer divides; so a channel that is constant, whose
        variance is rounding, has no error.

        Args:
            var: The variance of each channel, squared input units.
            var_error: The standard error of the variance that is stored: `population_var` or `within_var`.
            eps: Number that is added to the variances.
        """
        divisor = np.where(var + eps > 0, var + eps, np.inf)
        of_mean, of_var = self.mean / np.sqrt(divisor), var_error / (2 * divisor)
        worst = int(np.argmax(np.maximum(of_mean, of_var)))
        return StandardError(
            value=float(max(of_mean[worst], of_var[worst])),
            channel=worst,
            of="mean" if of_mean[worst] >= of_var[worst] else "variance",
        )


class BatchTotals:
    """Sums over the batches of a layer from which the standard errors of its statistics follow. O(C) memory.

    A pooled statistic is a ratio of two sums over batches, such as sum(count mean)/sum(count). With r_b for what the
    total of batch b differs from its count times the ratio, its squared standard error is
    sum(r_b^2) / (N^2 (1 - sum(w_b^2))), where N is the sum of the counts and w_b = count_b/N. The divisor makes it
    unbiased for independent batches of any sizes.

    Args:
        channels: C.

    Source:
        Cochran 1977, Sampling Techniques, section 6.3, for the standard error of a ratio. Wallace 1959, Bounds on
        normal approximations to Student's and the chi-square distributions, for the factor of few batches.
    """

    def __init__(self, channels: int) -> None:
        self._reference: Floats | None = None
        self._batch = np.zeros((3, channels))
        self._batch_count = 0.0
        self._sums, self._count = np.zeros((3, channels)), 0.0
        self._products = np.zeros((3, 3, channels))
        self._with_count, self._count_squares = np.zeros((3, channels)), 0.0
        self.batches = 0

    @property
    def mean(self) -> Floats:
        """The mean over the batches so far, of which there is one at least. Shape (C,), float64, input units."""
        assert self._reference is not None
        shift: Floats = self._sums[0] / self._count
        return self._reference + shift

    def add(self, count: int, mean: Floats, var: Floats) -> None:
        """Add one call to the batch in progress: number of values per channel, mean and unbiased variance, (C,)."""
        if self._reference is None:
            self._reference = mean.copy()
        shift = mean - self._reference  # near the mean of all batches, so that the squares do not cancel
        self._batch += count * np.stack([shift, var * ((count - 1) / count) + shift**2, var])
        self._batch_count += count

    def end_batch(self) -> tuple[Floats, Floats]:
        """End the batch in progress, which has a call at least, and return its mean and mean variance, (C,)."""
        totals, count = self._batch, self._batch_count
        self._sums += totals
        self._count += count
        self._products += totals[:, None] * totals
        self._with_count += count * totals
        self._count_squares += count**2
        self.batches += 1
        self._batch, self._batch_count = np.zeros_like(totals), 0.0
        assert self._reference is not None
        return self._reference + totals[0] / count, totals[2] / count

    def errors(self) -> MomentErrors | None:
        """Return the standard errors; None if the batches are too few."""
        if not self.batches:
            return None
        concentration = self._count_squares / self._count**2
        freedom = 1 / concentration - 1
        if freedom < _FEWEST:
            return None
        shift, square, within = self._sums / self._count
        variance = square - shift**2
        # The squared deviations of a batch from the mean of all are its squares about the reference, less
        # 2 shift (sum of values) - shift^2 count; less variance count, their sum over all batches is 0.
        coefficients = (
            (np.stack([np.ones_like(shift), *np.zeros((2, len(shift)))]), -shift),
            (np.stack([-2 * shift, np.ones_like(shift), np.zeros_like(shift)]), shift**2 - variance),
            (np.stack([*np.zeros((2, len(shift))), np.ones_like(shift)]), -within),
        )
        scale = _student_factor(freedom) / (self._count * math.sqrt(1 - concentration))
        mean, population, of_within = (scale * self._root_square(*pair) for pair in coefficients)
        bessel = self._count / (self._count - 1)
        return MomentErrors(batches=self.batches, mean=mean, population_var=population * bessel, within_var=of_within)

    def _root_square(self, factors: Floats, of_count: Floats) -> Floats:
        """Return the root of the sum over batches of (sum of factors * totals + of_count * count)^2."""
        square = np.einsum("ic,ijc,jc->c", factors, self._products, factors)
        square += 2 * of_count * (factors * self._with_count).sum(0) + of_count**2 * self._count_squares
        return np.asarray(np.sqrt(np.maximum(square, 0)), dtype=np.float64)


def _student_factor(freedom: float) -> float:
    """Return the ratio of the 95 % quantiles of Student's distribution and of the normal one: 1.21 for 7, 1.02 for 60.

    The error is below 1 % from 3 degrees of freedom on. For one, the factor is 9 instead of 6.5.
    """
    inner = (_NORMAL * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return math.sqrt(freedom * math.expm1(inner)) / _NORMAL
