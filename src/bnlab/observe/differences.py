"""Defines the difference between two estimates of a layer's statistics, in the unit of its normalised outputs."""

from __future__ import annotations

import numpy as np

from bnlab.observe.evidence import Floats

__all__ = ["differences"]


def differences(
    mean: Floats, var: Floats, reference_mean: Floats, reference_var: Floats, eps: float
) -> tuple[Floats, Floats]:
    """Return the differences of means and of variances from a reference, both with their signs.

    The first is (mean - reference_mean)/sqrt(reference_var + eps), in standard deviations of the reference. The second
    is half the log of (var + eps)/(reference_var + eps), the log of the ratio of the standard deviations.

    Args:
        mean: Shape (C,), input units.
        var: Shape (C,), squared input units.
        reference_mean: Shape (C,), input units.
        reference_var: Shape (C,), squared input units.
        eps: Number that is added to both variances, squared input units.

    Returns:
        Two arrays of shape (C,), float64; not finite where a statistic is not, or where a variance with eps is not
        above 0.
    """
    own, spread = var + eps, reference_var + eps
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (mean - reference_mean) / np.sqrt(spread), np.log(own / spread) / 2
