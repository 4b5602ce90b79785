"""Recognises running statistics that a port between frameworks converted in a wrong way, in every layer alike.

Frameworks store the statistics in different forms and orders. A converter that mistakes one form for another changes
every layer in the same way, so that one exact change brings all of them back to the statistics of the training data.
Statistics that are stale for another reason fit after none of these changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bnlab.observe.evidence import Floats, LayerState
from bnlab.observe.model_evidence import ModelLayer, Port
from bnlab.wording import OWN_FORMULA

__all__ = ["EFFECT", "RATIO", "Statistics", "port_of", "why_not_judged"]

EFFECT = 0.15
"""Mean effect of the stored statistics, in standard deviations, below which there is nothing to explain."""

RATIO = 0.25
"""Largest share of this effect that may be left after the change, for two layers or more."""

_RATIO_OF_ONE_LAYER = 0.4
"""The part of this share that may be left in a network of one layer."""

_RATIO_OF_FEW_UPDATES = 0.5
"""Largest share of what is left after a few updates, as another explanation, that may be left after the change."""

_INITIAL_WEIGHTS = tuple(np.arange(0.05, 1, 0.05).tolist())
"""The weights of the initial values with which this explanation is tried."""

_LARGEST = 1.0
"""Largest effect of a channel, in standard deviations: a few dead channels do not decide."""

_MISFIT = 0.35
"""Effect, in standard deviations, above which a channel does not fit."""

_MAX_MISFIT = 0.2
"""Share of the channels of each layer that may not fit after the change."""

_MIN_CHANNELS = 8
"""Number of channels below which a fit may be chance."""

Statistics = tuple[Floats, Floats]
"""Mean, in input units, and variance, in squared input units. Both of shape (C,), float64."""


@dataclass(frozen=True)
class _Conversion:
    """A mistake of a converter.

    Attributes:
        fault: The mistake as a noun phrase.
        statement: The mistake as a sentence without a final stop.
        change: What undoes it, as a clause that begins with "once".
        undo: Returns the right statistics from the stored mean, the stored variance and eps.
    """

    fault: str
    statement: str
    change: str
    undo: Callable[[Floats, Floats, float], Statistics]


def _exchanged(mean: Floats, var: Floats, _: float) -> Statistics:
    return var, np.where(mean >= 0, mean, np.nan)


def _squared(mean: Floats, var: Floats, _: float) -> Statistics:
    return mean, np.where(var >= 0, var**2, np.nan)


def _squared_without_eps(mean: Floats, var: Floats, eps: float) -> Statistics:
    return mean, np.where(var >= 0, np.maximum(var**2 - eps, 0), np.nan)


def _inverted(mean: Floats, var: Floats, eps: float) -> Statistics:
    return mean, np.where(var > 0, np.maximum(var**-2.0 - eps, 0), np.nan)


_DEVIATIONS = (
    "standard deviations stored as running_var",
    "running_var holds standard deviations",
    "once it is squared",
)
_CONVERSIONS = (
    _Conversion(
        "an exchange of running_mean and running_var",
        "running_mean and running_var are exchanged",
        "once they are exchanged back",
        _exchanged,
    ),
    _Conversion(*_DEVIATIONS, _squared),
    _Conversion(*_DEVIATIONS, _squared_without_eps),
    _Conversion(
        "inverse standard deviations stored as running_var",
        "running_var holds inverse standard deviations",
        "once it is replaced by 1/running_var^2 - eps",
        _inverted,
    ),
)


def why_not_judged(layer: ModelLayer) -> str | None:
    """Return why a layer shows nothing of a port; None if it does.

    A loss that is lower with the stored statistics is no reason. Standard deviations in place of larger variances make
    the outputs of a classifier more extreme, which lowers the loss where most of them are right.
    """
    if layer.frozen:
        return "frozen on purpose"
    if layer.own_formula is not None:
        return OWN_FORMULA
    if layer.state is None or layer.train_data is None:
        return "no running statistics, or not run on train_data"
    calls = 1 if layer.execution is None else layer.execution.calls
    return "called more than once per forward" if calls > 1 else None


def port_of(layers: Iterable[ModelLayer], *, effect: float = EFFECT, ratio: float = RATIO) -> Port | None:
    """Return the one change with which the running statistics of every layer fit the training data.

    Layers that show nothing of a port are left out. In a network of one layer a common factor on its variances, such as
    another scale of the input gives, does not count as an effect of the stored statistics. A change must also explain
    them better than few updates do, which leave a part of the initial mean 0 and variance 1: (1 + var)/2 is near the
    standard deviation where var is near 1.

    Args:
        layers: The layers.
        effect: Mean effect of the stored statistics, in standard deviations, below which there is nothing to explain.
        ratio: Largest share of the effect that may be left after the change, unitless.

    Returns:
        The change; None where none fits. Two changes never fit, unless the variances are near 1 and there is nothing to
        explain.
    """
    judged = [_Judged(layer, layer.state) for layer in layers if why_not_judged(layer) is None and layer.state]
    if sum(int(layer.counts.sum()) for layer in judged) < _MIN_CHANNELS:
        return None
    alone = len(judged) == 1
    before = _mean([layer.effect(layer.stored, ignores_factor=alone) for layer in judged])
    if before < effect:
        return None
    few_updates = min(_mean([layer.effect_of_few_updates(weight) for layer in judged]) for weight in _INITIAL_WEIGHTS)
    allowed = min(before * ratio * (_RATIO_OF_ONE_LAYER if alone else 1), few_updates * _RATIO_OF_FEW_UPDATES)
    ports = [_undone(conversion, judged, before) for conversion in _CONVERSIONS]
    best = min((port for port in ports if port is not None), key=lambda port: port.after, default=None)
    return best if best is not None and best.after <= allowed else None


def _undone(conversion: _Conversion, judged: Sequence[_Judged], before: float) -> Port | None:
    """Return what is left after a conversion is undone; None where some layer does not fit."""
    effects = [layer.effect(layer.undone(conversion)) for layer in judged]
    if any(np.mean(of_layer > _MISFIT) >= _MAX_MISFIT for of_layer in effects if len(of_layer)):
        return None
    return Port(
        fault=conversion.fault,
        statement=conversion.statement,
        change=conversion.change,
        layers=tuple(layer.name for layer in judged),
        before=before,
        after=_mean(effects),
    )


class _Judged:
    """The stored statistics of a layer beside those of its training data."""

    def __init__(self, layer: ModelLayer, state: LayerState) -> None:
        assert layer.train_data is not None
        pruned = None if layer.execution is None else layer.execution.pruned
        self.name, self._eps = layer.name, layer.eps
        self.stored: Statistics = (state.running_mean, state.running_var)
        self.counts = np.ones(layer.channels, dtype=np.bool_) if pruned is None else ~pruned.mask(layer.channels)
        self._mean, self._var = layer.train_data.within_mean, layer.train_data.within_var

    def undone(self, conversion: _Conversion) -> Statistics:
        """Return the statistics after a conversion is undone."""
        with np.errstate(all="ignore"):
            return conversion.undo(*self.stored, self._eps)

    def effect(self, statistics: Statistics, *, ignores_factor: bool = False) -> Floats:
        """Return the effect of each channel that is not pruned, in standard deviations, at most `_LARGEST`."""
        return self._distance(statistics, (self._mean, self._var), ignores_factor=ignores_factor)

    def effect_of_few_updates(self, weight: float) -> Floats:
        """Return the distance from statistics in which the initial values keep a weight, likewise."""
        return self._distance(self.stored, ((1 - weight) * self._mean, (1 - weight) * self._var + weight))

    def _distance(self, statistics: Statistics, reference: Statistics, *, ignores_factor: bool = False) -> Floats:
        (mean, var), (expected_mean, expected_var) = statistics, reference
        with np.errstate(all="ignore"):
            of_mean = np.abs(mean - expected_mean) / np.sqrt(self._var + self._eps)
            log_ratio = np.log((var + self._eps) / (expected_var + self._eps)) / 2
            if ignores_factor and np.isfinite(log_ratio).any():
                log_ratio = log_ratio - np.median(log_ratio[np.isfinite(log_ratio)])
            size = np.maximum(of_mean, np.abs(log_ratio))
        capped: Floats = np.minimum(np.nan_to_num(size, nan=_LARGEST), _LARGEST)
        return capped[self.counts]


def _mean(effects: Iterable[Floats]) -> float:
    return float(np.concatenate(list(effects)).mean())
