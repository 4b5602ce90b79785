"""The distance between two estimates of a layer's statistics, in standard deviations and in standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bnlab.observe.differences import differences
from bnlab.observe.evidence import Floats, Masks
from bnlab.observe.model_evidence import ModelLayer
from bnlab.wording import OWN_FORMULA, TRAINED_WITH

__all__ = [
    "STALE_CHANNELS",
    "STALE_EFFECT",
    "STALE_ERRORS",
    "STALE_SCALE",
    "Effect",
    "Estimate",
    "Stale",
    "Staleness",
    "effect_of",
    "is_stale",
    "stale_of",
    "staleness_of",
    "why_skipped",
]

STALE_EFFECT = 0.35
"""Effect, in standard deviations, above which the statistics of a channel are stale."""

STALE_ERRORS = 4.0
"""Effect in standard errors, likewise."""

STALE_CHANNELS = 0.1
"""Share of the channels from which on a layer is stale."""

STALE_SCALE = 0.25
"""Half the log of the ratio of variances, in the median over channels, beyond which a layer is stale."""

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


@dataclass(frozen=True, eq=False)
class Staleness:
    """The distance of the buffers of a layer from the statistics of its data.

    Attributes:
        effect: The effect of each channel.
        log_scale: Half the log of the ratio of variances, buffers against data. Shape (C,), with NaN in channels in
            which the ratio says nothing.
        log_scale_error: Its standard error, likewise.
    """

    effect: Effect
    log_scale: Floats
    log_scale_error: Floats

    @property
    def scale(self) -> float:
        """The median of `log_scale` over channels: negative where the buffers are too small; 0 without a channel."""
        known = self.log_scale[np.isfinite(self.log_scale)]
        return float(np.median(known)) if len(known) else 0.0

    @property
    def scale_errors(self) -> float:
        """`scale` in standard errors.

        The channels of a layer vary together, because they see the same samples. The error of their median is therefore
        taken to be the median of their errors, however many they are.
        """
        known = self.log_scale_error[np.isfinite(self.log_scale)]
        error = float(np.median(known)) if len(known) else np.inf
        return abs(self.scale) / max(error, _SMALLEST_ERROR)


@dataclass(frozen=True)
class Stale:
    """Why a layer is stale.

    Attributes:
        channels: The channels that are off.
        effect: The largest of their effects, in standard deviations.
        ratio: running_var over the variance of the data in the median channel, if that is the reason; None if the
            effects are.
    """

    channels: tuple[int, ...]
    effect: float
    ratio: float | None


def effect_of(estimate: Estimate, reference: Estimate, eps: float) -> Effect:
    """Return the effect of the difference between an estimate and a reference, per channel.

    Args:
        estimate: The estimate to judge.
        reference: The expected statistics. Their standard deviation, sqrt(var + eps), is the unit.
        eps: Number that is added to both variances, squared input units.
    """
    signed, _ = differences(estimate.mean, estimate.var, reference.mean, reference.var, eps)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        of_mean = np.where(estimate.mean - reference.mean == 0, 0.0, np.abs(signed))
        mean_error = np.sqrt((estimate.mean_noise + reference.mean_noise) / (reference.var + eps))
    log_scale, var_error = _log_scale(estimate, reference, eps)
    of_var = np.abs(log_scale)
    size = np.minimum(np.nan_to_num(np.maximum(of_mean, of_var), nan=_LARGEST), _LARGEST)
    error = np.where(of_mean >= of_var, mean_error, var_error)
    return Effect(size, size / np.fmax(error, _SMALLEST_ERROR))


def _relative(noise: Floats, var: Floats) -> Floats:
    return np.where(noise == 0, 0.0, noise / var**2)


def staleness_of(layer: ModelLayer) -> Staleness | None:
    """Return how far the buffers of a layer are from the statistics of its training data, or else of its data.

    The noise of a settled buffer is part of the error. None is returned for a layer without statistics or data. In a
    pruned channel the input never varies, and so the ratio of the variances says nothing: the effect is the root mean
    square difference of the normalised outputs.
    """
    state, seen = layer.state, layer.train_data or layer.data
    if state is None or seen is None:
        return None
    stored = np.where(np.isfinite(state.running_var), np.maximum(state.running_var, 0), np.inf)
    exact = np.zeros(state.channels)
    running = Estimate(state.running_mean, stored, exact, exact)
    noise = seen.buffer_noise(layer.momentum)
    reference = Estimate(seen.within_mean, seen.within_var, *noise)
    effect = effect_of(running, reference, layer.eps)
    log_scale, error = _log_scale(running, reference, layer.eps)
    pruned = None if layer.execution is None else layer.execution.pruned
    if pruned is None:
        return Staleness(effect, log_scale, error)
    mask, of_outputs = pruned.mask(layer.channels), _effect_on_outputs(running, reference, layer.eps)
    effect = Effect(
        np.where(mask, of_outputs.size, effect.size),
        np.where(mask, of_outputs.errors, effect.errors),
    )
    return Staleness(effect, np.where(mask, np.nan, log_scale), error)


def stale_of(
    layer: ModelLayer,
    *,
    effect: float = STALE_EFFECT,
    errors: float = STALE_ERRORS,
    channels: float = STALE_CHANNELS,
    scale: float = STALE_SCALE,
) -> Stale | None:
    """Return why the buffers of a layer are not those of its data, by the rule of BN401; None if they are.

    A layer is stale if a share `channels` of its channels exceeds `effect`, or if :attr:`Staleness.scale` exceeds
    `scale`. Either must exceed chance by `errors` standard errors.
    """
    staleness = staleness_of(layer)
    if staleness is None:
        return None
    off, ratio = staleness.effect.beyond(effect, errors), None
    if off.mean() < channels:
        if abs(staleness.scale) <= scale or staleness.scale_errors <= errors:
            return None
        with np.errstate(invalid="ignore"):
            off = np.sign(staleness.scale) * staleness.log_scale > scale
        ratio = math.exp(2 * staleness.scale)
    return Stale(tuple(np.flatnonzero(off).tolist()), float(staleness.effect.size[off].max()), ratio)


def why_skipped(layer: ModelLayer) -> str | None:
    """Return why the statistics of a layer are not compared with those of its data; None if they are."""
    if layer.frozen:
        return "frozen on purpose"
    if layer.trained_with:
        return TRAINED_WITH
    return OWN_FORMULA if layer.own_formula is not None else None


def is_stale(layer: ModelLayer) -> bool:
    """Return whether the buffers of a layer are not those of its data, by the default limits of BN401."""
    return stale_of(layer) is not None


def _log_scale(estimate: Estimate, reference: Estimate, eps: float) -> tuple[Floats, Floats]:
    """Return half the log of the ratio of variances with eps, and its standard error."""
    own, spread = estimate.var + eps, reference.var + eps
    _, log_scale = differences(estimate.mean, estimate.var, reference.mean, reference.var, eps)
    ratio = np.where(own == spread, 0.0, log_scale)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.sqrt(_relative(estimate.var_noise, own) + _relative(reference.var_noise, spread)) / 2
    return ratio, error


def _effect_on_outputs(estimate: Estimate, reference: Estimate, eps: float) -> Effect:
    """Return the root mean square difference of outputs that are normalised with an estimate or with a reference."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        own, other = 1 / np.sqrt(estimate.var + eps), 1 / np.sqrt(reference.var + eps)
        of_scale = (own - other) * np.sqrt(reference.var)
        of_mean = own * (reference.mean - estimate.mean)
        error = own * np.sqrt(reference.mean_noise)
    size = np.minimum(np.nan_to_num(np.hypot(of_scale, of_mean), nan=_LARGEST), _LARGEST)
    return Effect(size, size / np.fmax(error, _SMALLEST_ERROR))
