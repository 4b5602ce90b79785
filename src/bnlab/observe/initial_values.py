"""Computes the weight that the initial values keep in the statistics of a layer, and what they change in its output."""

from __future__ import annotations

import math

import numpy as np

from bnlab.conventions import SETTLED_WEIGHT
from bnlab.observe.differences import differences
from bnlab.observe.evidence import Floats, LayerState
from bnlab.observe.float_formats import FLOAT_FORMATS

__all__ = [
    "INITIAL_CHANNELS",
    "INITIAL_EFFECT",
    "has_initial_values",
    "initial_effect",
    "initial_weight",
    "is_barely_updated",
    "updates_needed",
    "weight_that_matters",
    "why_counter_is_wrong",
]

INITIAL_EFFECT = 0.1
"""Effect of the initial values on a channel, in standard deviations of its output, above which they matter."""

INITIAL_CHANNELS = 0.1
"""Share of the channels from which on they matter in a layer."""

_LARGEST = 1e6
"""Effect in place of an infinite one."""

_BELOW_ONE = 1 - 1e-9
"""Largest weight of the initial values: at 1 there are no data."""

_HALVINGS = 60
"""Number of steps in the search for a weight, each of which halves its range."""


def has_initial_values(state: LayerState) -> bool:
    """Return whether every running mean is 0 and every running variance is 1."""
    return not bool((state.running_mean != 0).any() or (state.running_var != 1).any())


def initial_weight(state: LayerState) -> float:
    """Return the weight (1 - a)^k of the initial values after k updates with momentum a.

    It is 0 for a cumulative average, whose first batch replaces the initial values, and without a counter.
    """
    momentum, counter = state.hyperparameters.momentum, state.num_batches_tracked
    return 0.0 if momentum is None or counter is None else float((1 - momentum) ** counter)


def updates_needed(momentum: float, weight: float) -> float:
    """Return the number of updates after which the initial values have this weight; inf for momentum 0."""
    if momentum <= 0:
        return math.inf
    return 1.0 if momentum >= 1 else math.log(weight) / math.log1p(-momentum)


def why_counter_is_wrong(state: LayerState) -> str | None:
    """Return why `num_batches_tracked` and momentum cannot be those of the statistics; None if they may be.

    A variance that began at 1 cannot be below (1 - a)^k.
    """
    counter, momentum = state.num_batches_tracked, state.hyperparameters.momentum
    if counter is None:
        return "num_batches_tracked is absent"
    if momentum is None:
        return None
    if counter < 0:
        return "num_batches_tracked is negative"
    if counter == 0 and not has_initial_values(state):
        return "num_batches_tracked is 0 although the statistics are not the initial ones"
    stored = FLOAT_FORMATS.get(state.dtype)
    rounding = min(0.5, (counter + 1) * (0.0 if stored is None else stored.epsilon))  # each update rounds once
    if (state.running_var < initial_weight(state) * (1 - rounding)).any():
        return f"num_batches_tracked and momentum {momentum:.3g} contradict running_var"
    return None


def initial_effect(state: LayerState, weight: float) -> Floats:
    """Return what initial values of a weight change in the normalised output of each channel, in standard deviations.

    A moving average with the weight w of the initial mean 0 and variance 1 is (1 - w) times that of the data, plus 0 or
    w. So m/(1 - w) and (r - w)/(1 - w) estimate the mean and the variance of the data from the running statistics m and
    r. The effect is the larger of abs(m/(1 - w) - m)/sqrt(v + eps) and abs(log((r + eps)/(v + eps)))/2.

    Returns:
        Shape (C,), float64; 0 where the statistics are not finite.
    """
    eps = state.hyperparameters.eps
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean = state.running_mean / (1 - weight)
        var = np.maximum(state.running_var - weight, 0) / (1 - weight)
    of_mean, of_var = differences(state.running_mean, state.running_var, mean, var, eps)
    return np.nan_to_num(np.fmax(np.abs(of_mean), np.abs(of_var)), nan=0.0, posinf=_LARGEST)


def is_barely_updated(
    state: LayerState,
    *,
    weight: float = SETTLED_WEIGHT,
    effect: float = INITIAL_EFFECT,
    channels: float = INITIAL_CHANNELS,
) -> bool:
    """Return whether the initial values still matter in statistics that were updated, as far as the counter is right.

    Args:
        state: The layer.
        weight: The weight of the initial values up to which they do not matter.
        effect: The effect up to which they do not matter in a channel, in standard deviations.
        channels: The share of the channels from which on they matter in the layer. Pruned channels do not count.
    """
    if not state.num_batches_tracked or has_initial_values(state):
        return False
    kept = initial_weight(state)
    return kept > weight and _matters(state, kept, effect, channels)


def weight_that_matters(
    state: LayerState,
    *,
    weight: float = SETTLED_WEIGHT,
    effect: float = INITIAL_EFFECT,
    channels: float = INITIAL_CHANNELS,
    ceiling: float = _BELOW_ONE,
) -> float | None:
    """Return the weight of the initial values above which :func:`is_barely_updated` is true; None if there is none.

    The arguments are those of :func:`is_barely_updated`, and the largest weight to try. The effect grows with the
    weight, and no weight is above the smallest running variance, because a variance that began at 1 cannot be below it.
    """
    largest = min(ceiling, float(np.min(state.running_var)))
    if has_initial_values(state) or largest <= weight or not _matters(state, largest, effect, channels):
        return None
    low, high = weight, largest
    if _matters(state, low, effect, channels):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _matters(state, middle, effect, channels) else (middle, high)
    return high


def _matters(state: LayerState, weight: float, effect: float, channels: float) -> bool:
    above = initial_effect(state, weight) > effect
    if state.pruned is not None:
        above = above[~state.pruned.mask(state.channels)]
    return bool(len(above)) and bool(above.mean() >= channels)
