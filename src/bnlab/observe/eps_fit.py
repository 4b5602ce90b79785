"""Infers the eps with which a network was trained from its running statistics.

A state dict does not hold eps. The input of every BN layer behind another one depends on the eps of the layers before
it, and the running statistics remember that input. The training data pass through the network with batch statistics and
with one eps after the other, and the eps that brings back the running statistics is that of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.conventions import TORCH_EPS
from bnlab.errors import UsageError
from bnlab.observe.differences import differences
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import EPS_MISMATCH, EpsFit, ModelLayer, Observed
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import KeptBatches, spread
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.subject import Subject

__all__ = ["GRID", "fit_eps", "mismatch"]

GRID = tuple(float(f"{10**exponent:.3g}") for exponent in np.arange(-7, -0.75, 0.5))
"""The values of eps that are tried first, from 1e-7 to 1e-1, in squared input units."""

_FLOOR = 0.05
"""Difference from the running statistics, in standard deviations, that needs no explanation."""

_MAX_RATIO = 400.0
"""Largest squared difference of a channel, in units of noise: a few dead channels must not decide."""

_SENSITIVITY = 0.05
"""Difference that eps makes in the input of a layer, in standard deviations, from which on the layer shows eps."""

_BATCHES = 12
"""Number of training batches that pass through the network for each eps."""

_REFINEMENTS = 6
"""Number of further values of eps that are tried around the best one of the grid."""

_MAX_CULPRITS = 3
"""Number of layers in front of the first one that does not fit, each of which may have another eps."""


def mismatch(layer: ModelLayer, seen: Observed) -> float:
    """Return how far the running statistics of a layer are from observed ones: 1 is as far as noise explains.

    It is the mean over channels of the squared differences of mean and of half the log variance, both in standard
    deviations, over the squared noise plus `_FLOOR` squared.
    """
    state = layer.state
    assert state is not None
    mean_noise, var_noise = seen.buffer_noise(layer.momentum)
    of_mean, of_var = differences(state.running_mean, state.running_var, seen.within_mean, seen.within_var, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_ratio = of_mean**2 / (mean_noise / seen.within_var + _FLOOR**2)
        var_ratio = of_var**2 / (var_noise / (4 * seen.within_var**2) + _FLOOR**2)
    ratios = np.concatenate([mean_ratio, var_ratio])
    ratios = ratios[~np.isnan(ratios)]
    return float(np.minimum(ratios, _MAX_RATIO).mean()) if len(ratios) else 0.0


def fit_eps(
    subject: Subject,
    modules: Mapping[str, nn.Module],
    layers: Iterable[ModelLayer],
    train_data: KeptBatches,
    *,
    always: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> EpsFit | None:
    """Return the eps that fits the running statistics, or why none can be identified.

    Args:
        subject: The model, which is restored afterwards.
        modules: Its BN layers by path.
        layers: The evidence on each of them, with its input over the training data.
        train_data: The training batches.
        always: Whether to fit also where the statistics agree with the data as they are.
        advance: Called after every batch.

    Returns:
        The fit; None where the statistics agree with the data as they are.
    """
    judged = [
        layer
        for layer in layers
        if layer.state is not None
        and layer.train_data is not None
        and layer.own_formula is None
        and isinstance(modules[layer.name], _BatchNorm)
        and (layer.execution is None or layer.execution.calls == 1)
    ]
    misfit = [layer for layer in judged if layer.train_data and mismatch(layer, layer.train_data) > EPS_MISMATCH]
    if not misfit and not always:
        return None
    runner = _Runner(subject, modules, judged, spread(train_data, _BATCHES), advance)
    names = [layer.name for layer in judged]
    try:
        whole = runner.fit(names)
        if whole.is_identified:
            return whole
        single = _of_a_single_layer(runner, judged, misfit)
    except UsageError:
        return None
    return single or whole


def _of_a_single_layer(runner: _Runner, judged: Sequence[ModelLayer], misfit: Sequence[ModelLayer]) -> EpsFit | None:
    """Return the fit of one layer in front of the first one that does not fit, if it explains everything."""
    if not misfit:
        return None
    names = [layer.name for layer in judged]
    first = names.index(misfit[0].name)
    for name in reversed(names[max(0, first - _MAX_CULPRITS) : first]):
        fit = runner.fit([name])
        if fit.is_identified:
            return replace(fit, layer=name)
    return None


@dataclass
class _Runner:
    """Runs the training batches with other values of eps."""

    subject: Subject
    modules: Mapping[str, nn.Module]
    layers: Sequence[ModelLayer]
    batches: Sequence[Batch]
    advance: Callable[[], None]

    def fit(self, names: Sequence[str]) -> EpsFit:
        """Return the eps of some layers that fits the running statistics of the layers behind them."""
        own = self._statistics({})
        tried = {eps: self._statistics(dict.fromkeys(names, eps)) for eps in GRID}
        behind = [layer for layer in self.layers if _changes(layer.name, list(tried.values()))]
        own_mismatch = self._mean_mismatch(behind, own)
        if not behind:
            return EpsFit(reason="eps moves the input of no BN layer by 0.05 standard deviations", own=own_mismatch)
        scores = {eps: self._mean_mismatch(behind, seen) for eps, seen in tried.items()}
        best = min(scores, key=scores.__getitem__)
        low, high = best / math.sqrt(10), best * math.sqrt(10)
        for _ in range(_REFINEMENTS):
            for eps in (math.sqrt(low * best), math.sqrt(best * high)):
                tried[eps] = self._statistics(dict.fromkeys(names, eps))
                scores[eps] = self._mean_mismatch(behind, tried[eps])
            ordered = sorted(scores)
            best = min(scores, key=scores.__getitem__)
            place = ordered.index(best)
            low, high = ordered[max(place - 1, 0)], ordered[min(place + 1, len(ordered) - 1)]
            if high / low < 1.3:
                break
        fits = [eps for eps, score in scores.items() if score <= max(2 * scores[best], scores[best] + 0.5)]
        low, high = 0.0 if min(fits) <= min(GRID) else min(fits), max(fits)
        return EpsFit(
            value=_conventional(best, low, high),
            low=low,
            high=high,
            own=own_mismatch,
            best=scores[best],
            fitted=tried[best],
            misfit=tuple(layer.name for layer in self.layers if self._of(layer, tried[best]) > 4 * EPS_MISMATCH),
        )

    def _statistics(self, eps: Mapping[str, float]) -> Mapping[str, Observed]:
        with self.subject.untouched():
            for name, value in eps.items():
                self.modules[name].eps = value  # type: ignore[assignment]
            return observe(self.subject, self.modules, self.batches, advance=self.advance)

    def _mean_mismatch(self, layers: Sequence[ModelLayer], seen: Mapping[str, Observed]) -> float:
        values = [self._of(layer, seen) for layer in layers]
        return float(np.mean(values)) if values else 0.0

    def _of(self, layer: ModelLayer, seen: Mapping[str, Observed]) -> float:
        return mismatch(layer, seen[layer.name]) if layer.name in seen else 0.0


def _conventional(best: float, low: float, high: float) -> float:
    """Return the power of ten in an interval that is nearest to the best value, or that value to two digits.

    Where any smaller eps fits too, the default of torch comes first.
    """
    if low == 0 and high >= TORCH_EPS:
        return TORCH_EPS
    powers = [10.0**exponent for exponent in range(-12, 0) if low <= 10.0**exponent <= high]
    if powers:
        return min(powers, key=lambda power: abs(math.log(power / best)))
    return float(f"{best:.2g}")


def _changes(name: str, tried: Sequence[Mapping[str, Observed]]) -> bool:
    """Return whether eps changes the input of a layer by `_SENSITIVITY`, at one end of the grid or the other."""
    observed = [seen[name] for seen in tried if name in seen]
    if len(observed) < 2:
        return False
    variances: list[Floats] = [seen.within_var for seen in observed]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(np.log(variances[0] / variances[-1])) / 2
    return bool(np.nanmedian(ratio) > _SENSITIVITY)
