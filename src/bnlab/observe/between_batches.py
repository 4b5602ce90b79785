"""Compares the means of batches with those of shuffled samples, whose distribution is known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import BetweenBatches

__all__ = ["between_batches", "normal_score", "shuffled_moments"]


def between_batches(batches: Sequence[Floats], sizes: Sequence[int], resolution: Floats) -> BetweenBatches:
    """Return how much the means of batches vary, relative to batches into which the same samples are shuffled.

    Shuffling moves whole samples, so channels that depend on each other are no problem. No shuffled batch is drawn:
    the mean and the variance over all permutations have a closed form.

    Args:
        batches: Samples of each batch, shape (samples, channels): at least one batch, with at least one sample.
        sizes: Number of samples in each whole batch, from which the samples were drawn. The ratio is that of whole
            batches.
        resolution: Smallest standard deviation of a channel that is no rounding error, shape (channels,), in the unit
            of the samples. Other channels are left out.
    """
    rows = np.concatenate(batches)
    drawn = np.array([len(batch) for batch in batches])
    evidence = BetweenBatches(batches=len(drawn), samples=float(np.mean(sizes)), ratio=1.0, z=0.0)
    spread = rows.std(0)
    usable = spread > resolution
    if len(drawn) < 2 or drawn.max() < 2 or not usable.any():
        return evidence
    standardised = (rows - rows.mean(0))[:, usable] / spread[usable]
    sums = np.add.reduceat(standardised, np.cumsum(drawn) - drawn)
    square = float(np.einsum("bc,bc,b->", sums, sums, 1 / drawn))
    mean, variance = shuffled_moments(standardised, drawn)
    own = square / mean
    per_sample = (own - 1) / (_samples_that_count(drawn) - 1)
    ratio = max(0.0, 1 + per_sample * (_samples_that_count(np.asarray(sizes)) - 1))
    return BetweenBatches(
        batches=evidence.batches, samples=evidence.samples, ratio=ratio, z=normal_score(own, variance / mean**2)
    )


def shuffled_moments(rows: Floats, sizes: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Return the mean and the variance, over all permutations of the rows, of the sum of squares between batches.

    The sum is that of n |m|^2 over batches with n rows and the mean m, over all columns.

    Args:
        rows: Shape (N, D) with N > 3; the mean of each column is 0.
        sizes: Number of rows in each batch; they add up to N.

    Source:
        Kazi-Aoual, Hitier, Sabatier and Lebreton 1995, Refined approximations to permutation tests for multivariate
        inference, Computational Statistics and Data Analysis 20: the moments of tr(W V) for W = X X^T and the centred
        projection V on the batches.
    """
    n, groups = len(rows), len(sizes)
    lengths = np.einsum("nd,nd->n", rows, rows)
    products = rows.T @ rows
    trace, trace_of_square, squares = lengths.sum(), (products**2).sum(), (lengths**2).sum()
    rank = groups - 1  # the trace of V, and that of its square
    diagonal = sum(1 / size for size in sizes) - 2 * groups / n + 1 / n  # the sum of the squares (1/size - 1/n)^2
    of_traces = ((n - 1) * trace_of_square - trace**2) * ((n - 1) * rank - rank**2)
    of_diagonals = (n * (n + 1) * squares - (n - 1) * (trace**2 + 2 * trace_of_square)) * (
        n * (n + 1) * diagonal - (n - 1) * (rank**2 + 2 * rank)
    )
    variance = 2 * of_traces / ((n - 1) ** 2 * (n + 1) * (n - 2))
    variance += of_diagonals / ((n + 1) * n * (n - 1) * (n - 2) * (n - 3))
    return float(trace * rank / (n - 1)), float(variance)


def normal_score(ratio: float, variance: float) -> float:
    """Return the standard normal deviate that is as improbable as a ratio with mean 1.

    A sum of squares has a long tail. With five batches, all of whose channels follow one quantity, chance exceeds six
    standard deviations in 3 of 10,000 cases. This score is above 5 in less than 1 of 100,000.

    Args:
        ratio: The ratio, at least 0.
        variance: Its variance; 0 for a ratio that cannot differ from 1, whose score is 0.

    Source:
        Wilson and Hilferty 1931, The distribution of chi-square: the cube root is nearly normal.
    """
    if not variance > 1e-12:
        return 0.0
    of_root = variance / 9
    return float((np.cbrt(ratio) - (1 - of_root)) / np.sqrt(of_root))


def _samples_that_count(sizes: np.ndarray) -> float:
    """Return the size of equal batches whose means vary as much as those of batches with these sizes."""
    total = sizes.sum()
    return float((total - (sizes**2).sum() / total) / max(len(sizes) - 1, 1))
