"""Computes the train/eval gap of a layer, split by cause, in closed form from sums over batches.

In each channel BN computes y = a x + b in both modes. The chain from train mode to eval mode replaces the statistics
link by link:

    this batch, biased  ->  unbiased  ->  mean over data  ->  shifted to train_data  ->  mean over train_data
    ->  the same with dropout on  ->  what the stored dtype can follow  ->  running statistics

Each link is a cause. Its part of the squared difference is <d_k, d_total>, and these parts add up to the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import Gap, Observed

__all__ = ["CAUSES", "IN_THE_STATISTICS", "RunningStatistics", "batch_sums", "layer_gap", "shares"]

CAUSES = (
    "bessel",
    "sampling noise",
    "heterogeneity",
    "shift",
    "training heterogeneity",
    "dropout",
    "precision",
    "staleness",
    "staleness or shift",
)
"""Every cause, in the order of the links."""

IN_THE_STATISTICS = ("staleness", "staleness or shift", "precision", "dropout", "training heterogeneity")
"""Causes that lie in the running statistics. Recomputing the statistics removes them."""

_PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative rounding error of the dtypes in which running statistics can stop moving."""


@dataclass(frozen=True, kw_only=True)
class RunningStatistics:
    """The statistics and constants that eval mode normalises with.

    Attributes:
        mean: Shape (C,).
        var: Shape (C,).
        dtype: The dtype in which mean and variance are stored.
        momentum: Weight of the new batch; None for a cumulative average.
        eps: The constant added to the variance.
    """

    mean: Floats
    var: Floats
    dtype: str
    momentum: float | None
    eps: float


def batch_sums(weight: float, mean: Floats, var: Floats, bessel: float, eps: float) -> dict[str, Floats]:
    """Return the terms that one batch adds to `Observed.moments`.

    Let mu and s^2 (biased) be the statistics of the batch, w its weight, and a0 and a1 the value of 1/sqrt(var + eps)
    for the biased and the unbiased variance. The terms are w, w mu, w mu^2, w s^2, and w s^2 times a0, a1, a0^2, a0 a1
    and a1^2.
    """
    a0, a1 = 1 / np.sqrt(var + eps), 1 / np.sqrt(var * bessel + eps)
    s2 = weight * var
    return {
        "w": np.full_like(mean, weight),
        "m": weight * mean,
        "mm": weight * mean**2,
        "s": s2,
        "s0": s2 * a0,
        "s1": s2 * a1,
        "s00": s2 * a0 * a0,
        "s01": s2 * a0 * a1,
        "s11": s2 * a1 * a1,
    }


Link = tuple[Floats, Floats]
"""The arrays a and b of y = a x + b, one value per channel."""


class _Products:
    """Inner products, over the data, of two affine functions: fixed ones (a, b), or that of each batch itself."""

    def __init__(self, moments: Mapping[str, Floats]) -> None:
        self._sums = moments
        self._total = moments["w"]

    def of(self, left: Link | int, right: Link | int) -> Floats:
        """Return <f, g> per value; 0 and 1 stand for the functions of the batches, with biased or unbiased variance."""
        sums = self._sums
        if isinstance(left, int) and isinstance(right, int):
            product = sums["s00" if left + right == 0 else "s11" if left + right == 2 else "s01"]
        elif isinstance(left, int):
            assert not isinstance(right, int)
            product = right[0] * sums[f"s{left}"]
        elif isinstance(right, int):
            product = left[0] * sums[f"s{right}"]
        else:
            (a, b), (c, d) = left, right
            product = a * c * (sums["s"] + sums["mm"]) + (a * d + b * c) * sums["m"] + b * d * sums["w"]
        return product / self._total


def layer_gap(
    running: RunningStatistics,
    data: Observed,
    train_data: Observed | None = None,
    dropped: Observed | None = None,
    shuffled: Observed | None = None,
    common: tuple[Observed, Observed] | None = None,
) -> Gap:
    """Return the gap of a layer on `data`, split by cause.

    Args:
        running: The running statistics.
        data: The input of the layer over the data on which the gap is measured.
        train_data: Its input over the training data, with dropout off. Without it staleness and shift are one cause.
        dropped: Its input over the training data, or else over `data`, with dropout on; None if nothing drops values.
        shuffled: Its input over the samples of `data` in random batches, which measures the sampling noise. Without it
            the noise is estimated from single samples. Behind another BN layer that estimate is too large, because the
            earlier layer removes the noise of the batch.
        common: Its inputs over `data` and `train_data` in batches of a common size, between which the shift is
            measured. What the size changes is sampling noise. None for `data` and `train_data` as they are.

    Source:
        rms^2 = (a1-a2)^2 var + ((a1-a2) mean + b1-b2)^2 for two affine functions of a variable.
    """
    eps = running.eps
    chain: list[tuple[str, Link | int, Floats | float]] = [
        ("bessel", 1, 0.0),
        (
            "heterogeneity",
            _link(data.within_mean, data.within_var, eps),
            _expected_between_batches(data, shuffled, eps),
        ),
    ]
    latest = (data.within_mean, data.within_var)
    if train_data is not None:
        before, after = (data, train_data) if common is None else common
        if before is not data:
            latest = (before.within_mean, before.within_var)
            chain.append(("sampling noise", _link(*latest, eps), 0.0))
        latest = _with_other_population(latest, before.mean, before.var, after.mean, after.var)
        error = _relative(
            before.mean_error**2 + after.mean_error**2, before.var_error**2 + after.var_error**2, data, eps
        )
        chain.append(("shift", _link(*latest, eps), error))
        latest = (train_data.within_mean, train_data.within_var)
        cause = "training heterogeneity" if after is train_data else "sampling noise"
        chain.append((cause, _link(*latest, eps), error))
    reference = data if train_data is None else train_data
    if dropped is not None:
        latest = (
            latest[0] + dropped.within_mean - reference.within_mean,
            latest[1] + dropped.within_var - reference.within_var,
        )
        chain.append(("dropout", _link(*latest, eps), 0.0))
    rounded = _reachable_statistics(latest, running)
    if rounded is not None:
        chain.append(("precision", _link(*rounded, eps), 0.0))
    last = "staleness or shift" if train_data is None else "staleness"
    chain.append((last, _link(running.mean, running.var, eps), _expected_of_buffers(reference, running)))
    return _split(chain, data)


def _with_other_population(statistics: Link, mean: Floats, var: Floats, new_mean: Floats, new_var: Floats) -> Link:
    """Return mean and variance after a population with one mean and variance is replaced by another."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(var > 0, new_var / var, 1.0)
    return statistics[0] + new_mean - mean, statistics[1] * ratio


def _split(chain: list[tuple[str, Link | int, Floats | float]], data: Observed) -> Gap:
    products = _Products(data.moments)
    final = chain[-1][1]

    def against_total(link: Link | int) -> Floats:
        return products.of(link, final) - products.of(link, 0)

    per_channel = np.maximum(products.of(final, final) - 2 * products.of(final, 0) + products.of(0, 0), 0)
    parts: dict[str, float] = {}
    before: Link | int = 0
    for cause, link, expected in chain:
        part = float(np.mean(against_total(link) - against_total(before)))
        own = float(np.mean(products.of(link, link) - 2 * products.of(link, before) + products.of(before, before)))
        noise = min(1.0, float(np.mean(expected)) / own) if own > 0 else 0.0
        parts[cause] = parts.get(cause, 0.0) + part * (1 - noise)
        if noise:
            parts["sampling noise"] = parts.get("sampling noise", 0.0) + part * noise
        before = link
    return Gap(square=float(np.mean(per_channel)), by_cause=parts, per_channel=per_channel)


def _link(mean: Floats, var: Floats, eps: float) -> Link:
    """Return a and b; both are 0 where they are not finite, as for a variance without a real root."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a = 1 / np.sqrt(var + eps)
        b = -mean * a
    valid = np.isfinite(a) & np.isfinite(b)
    return np.where(valid, a, 0.0), np.where(valid, b, 0.0)


def _relative(mean_square: Floats, var_square: Floats, data: Observed, eps: float) -> Floats:
    """Return the squared difference in normalised outputs that errors of the mean and the variance cause."""
    spread = data.var + eps
    return mean_square / spread + var_square / (4 * spread**2)


def _expected_between_batches(data: Observed, shuffled: Observed | None, eps: float) -> Floats:
    """Return the part of the difference between a batch and the mean over batches that sampling explains."""
    if shuffled is not None and shuffled.batches > 1:
        products = _Products(shuffled.moments)
        mean = _link(shuffled.within_mean, shuffled.within_var, eps)
        square = products.of(mean, mean) - 2 * products.of(mean, 1) + products.of(1, 1)
        return square * shuffled.batches / (shuffled.batches - 1) * (1 - 1 / max(data.batches, 2))
    images = max(data.images_per_batch, 1.0)
    return _relative(data.image_mean_var / images, data.image_square_var / images, data, eps)


def _expected_of_buffers(reference: Observed, running: RunningStatistics) -> Floats:
    """Return the part of the difference between buffers and data that sampling explains."""
    return _relative(*reference.buffer_noise(running.momentum), reference, running.eps)


def _reachable_statistics(target: tuple[Floats, Floats], running: RunningStatistics) -> tuple[Floats, Floats] | None:
    """Return the statistics nearest to the buffers that rounding alone explains; None for dtypes that do not get stuck.

    Rounding removes an update of less than half a unit in the last place. With momentum a the buffer therefore stops
    moving as soon as a |target - buffer| is smaller than that.
    """
    rounding = _PRECISION.get(running.dtype)
    if rounding is None:
        return None
    reach = rounding / (running.momentum or 1.0) + rounding
    stalled = []
    for wanted, stored in zip(target, (running.mean, running.var), strict=True):
        room = reach * np.maximum(np.abs(stored), np.abs(wanted))
        overflows = running.dtype == "float16" and not np.isfinite(stored).all()
        reachable = np.clip(stored, wanted - room, wanted + room)
        stalled.append(
            np.where(~np.isfinite(stored) & (np.abs(wanted) > 65504), stored, reachable) if overflows else reachable
        )
    return stalled[0], stalled[1]


_MAX_PART = 100.0


def shares(gaps: Mapping[str, Gap]) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Return the share of each cause in the gap over all layers, and the layers in which it acts, largest first.

    Each layer counts by its mean squared difference. The shares add up to 1, and a single share may be negative.
    """
    gaps = {name: gap for name, gap in gaps.items() if _is_meaningful(gap)}
    total = sum(gap.square for gap in gaps.values())
    if not total > 0:
        return {}
    share_by_cause: dict[str, tuple[float, tuple[str, ...]]] = {}
    for cause in CAUSES:
        parts = {name: gap.by_cause[cause] for name, gap in gaps.items() if cause in gap.by_cause}
        if parts:
            whole = sum(parts.values())
            ordered = sorted(parts, key=lambda name: -parts[name])
            acting = tuple(name for name in ordered if parts[name] > 0.05 * max(whole, 0.0) and parts[name] > 0)
            share_by_cause[cause] = (whole / total, acting)
    return dict(sorted(share_by_cause.items(), key=lambda item: -item[1][0]))


def _is_meaningful(gap: Gap) -> bool:
    """Return whether a gap is finite, and its parts are not the difference of far larger numbers that cancel."""
    return bool(np.isfinite(gap.square)) and all(abs(part) <= _MAX_PART * gap.square for part in gap.by_cause.values())
