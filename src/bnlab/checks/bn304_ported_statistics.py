"""BN304: running statistics that a port converted in a wrong way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import executed, healthy, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.observe.ported import EFFECT, RATIO, Statistics, port_of, why_not_judged
from bnlab.records import Finding, Quantity
from bnlab.wording import counted

__all__ = ["PortedStatistics"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN304."""

    effect: float = limit(
        EFFECT, unit="std", source="the statistics of 156 trained networks are up to 0.09 from those of their data"
    )
    ratio: float = limit(
        RATIO,
        unit="ratio of effects",
        source="ports of trained networks: at most 0.19; statistics that are stale otherwise: at least 0.43",
    )


class PortedStatistics(ModelCheck[Limits]):
    """Running statistics that fit the training data in every layer after one exact change.

    ## What it does
    The check looks for one of three mistakes of a converter that explains the running statistics of all layers: mean
    and variance are exchanged, or running_var holds the standard deviation, or the inverse standard deviation.

    ## Why it matters
    Every layer normalises with wrong numbers, and the network looks badly trained. The weights are right, so that
    training it again is a waste. MatConvNet stores means and standard deviations, old files of Torch7 store inverse
    standard deviations, and Keras takes the four arrays of a layer by their place in a list.

    ## Evidence
    The check undoes each mistake and compares the result with the statistics of the training data, which are measured
    with every layer upstream on batch statistics and do not depend on the stored ones. Layers that are frozen, called
    several times per forward or not run are left out. A biased variance in place of an unbiased one is too near to be
    recognised. A port that changes eps is the subject of BN303.

    ## Threshold
    The effect of a channel is abs(difference of means)/std or abs(log of the ratio of variances)/2, at most 1. Its mean
    over all channels is at least `effect` as stored, and at most `ratio` times that after the change. After the change
    no layer may have an effect above 0.35 standard deviations in 20 % of its channels.

    Two other explanations are ruled out. Few updates leave a part of the initial variance 1, and (1 + var)/2 is near
    the standard deviation where var is near 1: the change must leave at most half of what this explanation leaves. In a
    network of one layer a common factor of the variances does not count as an effect, and at most 0.4 times `ratio` may
    be left. Variances near 1 show nothing.

    ## Remedy
    `recalibrate` computes the right statistics. Repair the converter as well, where it is used again.

    ## Sources
    The array `Moments` of MatConvNet (https://www.vlfeat.org/matconvnet/mfiles/vl_nnbnorm/); the function `read` of
    Torch7 (https://github.com/torch/nn/blob/master/BatchNormalization.lua); a list in the wrong order in
    https://github.com/gmalivenko/pytorch2keras/issues/120.
    """

    code, group, needs = "BN304", Group.SUSPICIOUS, Needs.TRAIN_DATA
    remedies = ("recalibrate",)
    why = "eval mode normalises every layer with numbers that a converter mistook for mean and variance"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why a layer shows nothing of a port."""
        return why_not_judged(layer)

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for a change that fits every layer."""
        port = port_of(evidence.layers, effect=self.limits.effect, ratio=self.limits.ratio)
        if port is None:
            return
        yield self.finding(
            None,
            f"{port.statement} in {counted(len(port.layers), 'layer')}: the running statistics are "
            f"{show(port.before)} standard deviations from those of the training data on average, must be < "
            f"{show(self.limits.effect)}, and {show(port.after)} {port.change}",
            measured={"effect": Quantity(port.before, "std"), "effect after the change": Quantity(port.after, "std")},
            threshold={"effect": Quantity(self.limits.effect, "std")},
        )

    CLEAN = (
        Case("healthy", lambda: _network(lambda mean, var: (mean, var))),
        Case("other statistics in both layers", lambda: _network(lambda mean, var: (mean[::-1], 3 * var[::-1]))),
        Case("few updates", lambda: _network(lambda mean, var: (0.7 * mean, 0.3 + 0.7 * var))),
        Case("one layer of two", lambda: model(_layer("a", lambda mean, var: (var, mean)), _layer("b"))),
        Case("variances of the inputs times 9", lambda: _network(lambda mean, var: (3 * mean, 9 * var))),
        Case("one layer with few channels", lambda: model(_layer("a", lambda mean, var: (var, mean)))),
        Case("variances near 1", lambda: model(_layer("a", _root, (1.1,) * 4), _layer("b", _root, (0.9,) * 4))),
    )
    BROKEN = (
        Case("mean and variance exchanged", lambda: _network(lambda mean, var: (var, mean)), layers=(None,)),
        Case("standard deviations", lambda: _network(_root), layers=(None,)),
        Case("inverse standard deviations", lambda: _network(lambda m, v: (m, 1 / np.sqrt(v + 1e-5))), layers=(None,)),
        Case(
            "a frozen layer and a shared one are left out",
            lambda: model(*_network(_root).layers, _layer("c", frozen=True), _layer("d", execution=executed(calls=2))),
            layers=(None,),
        ),
    )


def _root(mean: Floats, var: Floats) -> Statistics:
    return mean, np.sqrt(var)


def _network(stored: Callable[[Floats, Floats], Statistics]) -> ModelEvidence:
    """Return two layers that store other statistics than those of their data."""
    return model(_layer("a", stored), _layer("b", stored, (0.02, 0.3, 0.01, 8.0)))


def _layer(
    name: str,
    stored: Callable[[Floats, Floats], Statistics] = lambda mean, var: (mean, var),
    var: tuple[float, ...] = (0.05, 6.0, 0.1, 12.0),
    **changes: object,
) -> ModelLayer:
    seen = observed(var=var)
    mean, variance = stored(seen.within_mean, seen.within_var)
    state = healthy(name, running_mean=tuple(mean), running_var=tuple(variance))
    return model_layer(name, state=state, train_data=seen, **changes)
