"""BN105: too few updates for the momentum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlab.checks.cases import healthy, network, of, untrained
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.conventions import SETTLED_WEIGHT
from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.observe.initial_values import (
    INITIAL_CHANNELS,
    INITIAL_EFFECT,
    initial_effect,
    initial_weight,
    is_barely_updated,
    why_counter_is_wrong,
)
from bnlab.observe.upstream import momentum_advice
from bnlab.records import Finding, Quantity
from bnlab.wording import TRAINED_WITH, counted

__all__ = ["StatisticsBarelyUpdated"]

_YOUNG: Any = {"num_batches_tracked": 90, "momentum": 0.001}


@dataclass(frozen=True)
class Limits:
    """Limits of BN105."""

    initial_weight: float = limit(
        SETTLED_WEIGHT, unit="fraction", source="44 updates at momentum 0.1, 458 at 0.01, 4603 at 0.001"
    )
    effect: float = limit(
        INITIAL_EFFECT, unit="standard deviations", source="simulated layers on N(0, 1) data: 0 of 120 exceed it"
    )
    channels: float = limit(INITIAL_CHANNELS, unit="fraction", source="as in BN401")


class StatisticsBarelyUpdated(Check[Limits]):
    """Running statistics that still contain their initial values.

    ## What it does
    After k updates with momentum a, the initial values 0 and 1 have the weight w = (1 - a)^k in the running statistics
    m and r. The check computes this weight from `num_batches_tracked`. m/(1 - w) and v = (r - w)/(1 - w) are then the
    statistics of the data alone, and the check computes what the initial values change in the output.

    ## Why it matters
    The network is good in train mode and near chance in eval mode, although training went well. The running statistics
    are a mixture of the data and of the initial 0 and 1. Usually a short training or fine-tuning has the momentum of a
    long one: 0.01, which is a Keras decay of 0.99, or 0.001.

    ## Evidence
    The check reads `num_batches_tracked`, `running_mean`, `running_var` and momentum. A state dict does not hold the
    momentum. The check assumes 0.1 and reports the assumption, unless the momentum is stated (`--momentum`). With
    momentum None, a cumulative average, the first batch replaces the initial values and the check reports nothing. The
    counter must be consistent with the buffers: a buffer that began at 1 cannot be below (1 - a)^k. The check therefore
    skips a layer with such a channel, or with a counter of 0 and other statistics than the initial ones. It also skips
    a layer whose statistics agree with data, where there is data.

    ## Threshold
    The effect is the larger of abs(m/(1 - w) - m)/sqrt(v + eps) and abs(log((r + eps)/(v + eps)))/2. The check reports
    a layer if w is above `initial_weight` and the effect is above `effect` in at least a share `channels` of the
    channels: 0 of 120 simulated layers on data of mean 0 and variance 1, which are like the initial values, and 120 of
    120 on data of variance 1e-6.

    ## Remedy
    `recalibrate`.

    ## Sources
    Ioffe and Szegedy 2015 (arXiv 1502.03167), Algorithm 2, and Wu and Johnson 2021 (arXiv 2105.07576), who evaluate
    networks before the average has settled; docs/background.md, "What the running statistics average".
    """

    code, group, needs = "BN105", Group.SUSPICIOUS, Needs.STATE
    remedies = ("recalibrate",)
    why = "eval mode normalises with a mixture of the data and of the initial 0 and 1"
    limits = Limits()

    def lacks(self, layer: LayerState) -> str | None:
        """Return the reason why the counter cannot be used."""
        if layer.trained_with:
            return TRAINED_WITH
        if layer.settled:
            return "data shows that the statistics have settled"
        return why_counter_is_wrong(layer)

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer whose statistics contain their initial values."""
        least, size, share = self.limits.initial_weight, self.limits.effect, self.limits.channels
        for layer in evidence.layers:
            momentum, counter = layer.hyperparameters.momentum, layer.num_batches_tracked or 0
            if momentum is None or not is_barely_updated(layer, weight=least, effect=size, channels=share):
                continue
            weight, effect = initial_weight(layer), initial_effect(layer, initial_weight(layer))
            channels = tuple(np.flatnonzero(effect > size).tolist())
            assumed = "an assumed momentum" if "momentum" in layer.hyperparameters.assumed else "momentum"
            yield self.finding(
                layer,
                f"after {counted(counter, 'update')} at {assumed} {show(momentum)} the initial values keep "
                f"{show(100 * weight)} % of the weight, must be <= {show(100 * least)} %, and change the output by up "
                f"to {show(float(effect.max()))} standard deviations {in_channels(channels, layer)}, must be <= "
                f"{show(size)}, unless update_bn recomputed the statistics; {momentum_advice(counter)}",
                measured={
                    "initial weight": Quantity(weight, "fraction"),
                    "effect": Quantity(float(effect.max()), "standard deviations"),
                    "num_batches_tracked": Quantity(counter, "batches"),
                },
                threshold={
                    "initial weight": Quantity(least, "fraction"),
                    "effect": Quantity(size, "standard deviations"),
                },
            )

    CLEAN = (
        Case("1000 updates", of),
        Case("44 updates", lambda: of(num_batches_tracked=44)),
        Case("cumulative average of 3", lambda: of(num_batches_tracked=3, momentum=None)),
        Case("no counter", lambda: of(num_batches_tracked=None)),
        Case("counter 0, yet trained", lambda: of(num_batches_tracked=0)),
        Case("data like the initial values", lambda: of(running_mean=(0.001,) * 4, running_var=(1,) * 4, **_YOUNG)),
        Case("counter 2, yet variance 0.4", lambda: of(num_batches_tracked=2)),
        Case("settled, as data shows", lambda: of(num_batches_tracked=2, running_var=(2, 2, 2, 2), settled=True)),
        Case("never updated is BN104", lambda: network(untrained(), untrained("b", num_batches_tracked=5))),
    )
    BROKEN = (
        Case(
            "momentum 0.001 for 90 steps",
            lambda: network(healthy("a", running_var=(1.1, 0.95, 1.3, 1.0), **_YOUNG), healthy("b")),
            layers=("a",),
            measured={"initial weight": 0.999**90, "num_batches_tracked": 90},
        ),
        Case(
            "data of variance 1e-6",
            lambda: of(running_mean=(0,) * 4, running_var=(1e-6 + (1 - 1e-6) * 0.999**90,) * 4, **_YOUNG),
            layers=("bn",),
            measured={"initial weight": 0.999**90},
        ),
        Case(
            "one batch of a constant",
            lambda: of(running_var=tuple(np.full(4, np.float32(0.9), dtype=np.float64)), num_batches_tracked=1),
            layers=("bn",),
            measured={"initial weight": 0.9},
        ),
    )
