"""Shows whether successive batches of a loader are alike, so that the batches so far say little about those to come."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from bnlab.observe.evidence import Floats
from bnlab.observe.passes.batch_rows import spread_channels

__all__ = ["SuccessiveRows", "is_ordered", "order_score"]

_MAX_ROWS = 256
_RESOLUTION = 1e-6
"""Root mean square of rows, in standard deviations, that rounding explains."""

_FALSE_ALARMS = 1e-3
"""Share of shuffled loaders that are called ordered, for each time that one looks."""


class SuccessiveRows:
    """The statistics of batches in their order, in at most 256 rows and 32 channels.

    Rows of longer data are merged in pairs.
    """

    def __init__(self, channels: int) -> None:
        self._chosen = spread_channels(channels)
        self._rows: list[Floats] = []
        self._part: list[Floats] = []
        self._batches_in_row = 1

    def add(self, mean: Floats, var: Floats) -> None:
        """Add the mean and variance of one call, both of shape (C,)."""
        self._part.append(np.stack([mean[self._chosen], var[self._chosen]]))
        if len(self._part) < self._batches_in_row:
            return
        self._rows.append(np.asarray(np.mean(self._part, 0), dtype=np.float64))
        self._part.clear()
        if len(self._rows) == _MAX_ROWS:
            self._rows = [(left + right) / 2 for left, right in zip(self._rows[::2], self._rows[1::2], strict=True)]
            self._batches_in_row *= 2

    def score(self, mean: Floats, var: Floats, eps: float) -> float:
        """Return :func:`order_score` of the rows, in standard deviations of the channels.

        Args:
            mean: Mean of each channel, shape (C,), input units.
            var: Variance of each channel, shape (C,), squared input units.
            eps: Number that is added to the variances.
        """
        if not self._rows:
            return 0.0
        rows = np.stack(self._rows)
        divisor = var[self._chosen] + eps
        divisor = np.where(divisor > 0, divisor, np.inf)
        of_mean = (rows[:, 0] - mean[self._chosen]) / np.sqrt(divisor)
        of_var = np.arcsinh(rows[:, 1] / divisor) / 2  # near a log, and finite for a variance of 0
        return order_score(np.concatenate([of_mean, of_var], 1))


def order_score(rows: Floats) -> float:
    """Return how alike successive rows are, as a standard normal deviate if every order of the rows is as likely.

    The statistic is the sum of the products of successive rows. Its mean and variance over all orders follow from the
    products of all pairs of rows, so that columns that depend on each other are no problem.

    Args:
        rows: One row per batch, shape (B, D). The mean of each column is taken off.

    Source:
        Wald and Wolfowitz 1943, An exact test for randomness in the non-parametric case based on serial correlation.
    """
    count = len(rows)
    centred = rows - rows.mean(0)
    if count < 4 or not np.sqrt((centred**2).mean()) > _RESOLUTION:
        return 0.0
    products = centred @ centred.T
    trace, squares = float(np.trace(products)), float((products**2).sum())
    diagonal = np.diag(products)
    of_diagonal = float((diagonal**2).sum())
    # Sums over all ordered pairs, triples and quadruples of distinct rows; each row of the products sums to 0.
    pairs = squares - of_diagonal
    triples = -pairs + of_diagonal  # sum over i of (sum over j != i of G_ij)^2 is that of G_ii^2
    quadruples = trace**2 - 4 * triples - 2 * pairs
    links = count - 1
    orders = count * (count - 1)
    mean = -trace / count
    second = (
        links * pairs / orders
        + 2 * (links - 1) * triples / (orders * (count - 2))
        + (links * links - links - 2 * (links - 1)) * quadruples / (orders * (count - 2) * (count - 3))
    )
    variance = second - mean**2
    observed = float(np.trace(products, offset=1))
    return (observed - mean) / float(np.sqrt(variance)) if variance > 0 else 0.0


def is_ordered(scores: Sequence[float]) -> bool:
    """Return whether the largest of the scores of some layers is improbable for shuffled batches."""
    if not scores:
        return False
    return max(scores) > NormalDist().inv_cdf(1 - _FALSE_ALARMS / len(scores))
