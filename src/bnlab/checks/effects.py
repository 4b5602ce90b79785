"""The distance between two estimates of a layer's statistics, in standard deviations and in standard errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnlab.observe.evidence import Floats, Masks
from bnlab.observe.model_evidence import ModelLayer

__all__ = ["Effect", "Estimate", "effect_of", "staleness_of"]

_LARGEST = 1e6
"""Largest effect, in standard deviations. It replaces larger ones and those that are not finite."""

_SMALLEST_ERROR = 1e-12
"""Smallest standard error, in standard deviations. It replaces smaller ones and 0/0, that of constants without eps."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Mean and variance of the input of a layer, with the squares of their standard errors. All of shape (C,), float64.

    Attributes:
        mean: Input units.
        var: Squared input units, at least 0; inf where it is not a finite number.
        mean_noise: Squared standard error of the mean, squared input units; 0 for an exact mean.
        var_noise: Squared standard error of the variance, input units to the fourth power.
    """

    mean: Floats
    var: Floats
    mean_noise: Floats
    var_noise: Floats


@dataclass(frozen=True, eq=False)
class Effect:
    """The larger of the effects that mean and variance have on normalised outputs. Both of shape (C,), float64.

    Attributes:
        size: abs(difference of means)/std, or abs(log of the ratio of variances)/2; standard deviations.
        errors: The same effect in standard errors.
    """

    size: Floats
    errors: Floats

    def beyond(self, size: float, errors: float) -> Masks:
        """Return the channels that exceed both limits: their effect matters, and chance does not explain it."""
        return (self.size > size) & (self.errors > errors)


def effect_of(estimate: Estimate, reference: Estimate, eps: float) -> Effect:
    """Return the effect of the difference between an estimate and a reference, per channel.

    Args:
        estimate: The estimate to judge.
        reference: The expected statistics. Their standard deviation, sqrt(var + eps), is the unit.
        eps: Number that is added to both variances, squared input units.
    """
    own, spread = estimate.var + eps, reference.var + eps
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        difference, ratio = np.abs(estimate.mean - reference.mean), own / spread
        of_mean = np.where(difference == 0, 0.0, difference / np.sqrt(spread))
        of_var = np.where(own == spread, 0.0, np.abs(np.log(ratio)) / 2)
        mean_error = np.sqrt((estimate.mean_noise + reference.mean_noise) / spread)
        var_error = np.sqrt(_relative(estimate.var_noise, own) + _relative(reference.var_noise, spread)) / 2
    size = np.minimum(np.nan_to_num(np.maximum(of_mean, of_var), nan=_LARGEST), _LARGEST)
    error = np.where(of_mean >= of_var, mean_error, var_error)
    return Effect(size, size / np.fmax(error, _SMALLEST_ERROR))


def _relative(noise: Floats, var: Floats) -> Floats:
    return np.where(noise == 0, 0.0, noise / var**2)


def staleness_of(layer: ModelLayer) -> Effect | None:
    """Return how far the buffers of a layer are from the statistics of its training data, or else of its data.

    The noise of a settled buffer is part of the error. None is returned for a layer without statistics or data.
    """
    state, seen = layer.state, layer.train_data or layer.data
    if state is None or seen is None:
        return None
    stored = np.where(np.isfinite(state.running_var), np.maximum(state.running_var, 0), np.inf)
    exact = np.zeros(state.channels)
    running = Estimate(state.running_mean, stored, exact, exact)
    noise = seen.buffer_noise(layer.momentum)
    return effect_of(running, Estimate(seen.within_mean, seen.within_var, *noise), layer.eps)
