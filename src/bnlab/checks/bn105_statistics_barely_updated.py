"""BN105: too few updates for the momentum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import healthy, network, of, untrained
from bnlab.checks.check import TRAINED_WITH, Case, Check, Group, Needs, limit, show
from bnlab.conventions import SETTLED_WEIGHT
from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.observe.initial_values import has_initial_values, initial_weight, why_counter_is_wrong
from bnlab.observe.upstream import momentum_that_settles
from bnlab.records import Finding, Quantity
from bnlab.wording import counted

__all__ = ["StatisticsBarelyUpdated"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN105."""

    initial_weight: float = limit(
        SETTLED_WEIGHT, unit="fraction", source="44 updates at momentum 0.1, 458 at 0.01, 4603 at 0.001"
    )


class StatisticsBarelyUpdated(Check[Limits]):
    """Running statistics that still contain their initial values.

    ## What it does
    After k updates with momentum a, the initial values 0 and 1 have the weight (1 - a)^k in the running statistics. The
    check computes this weight from `num_batches_tracked`.

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
    At a weight of 1 % the initial values no longer matter.

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
        for layer in evidence.layers:
            momentum, counter = layer.hyperparameters.momentum, layer.num_batches_tracked
            weight = initial_weight(layer)
            if momentum is None or not counter or has_initial_values(layer) or weight <= self.limits.initial_weight:
                continue
            assumed = "an assumed momentum" if "momentum" in layer.hyperparameters.assumed else "momentum"
            yield self.finding(
                layer,
                f"after {counted(counter, 'update')} at {assumed} {show(momentum)} the initial values "
                f"keep {show(100 * weight)} % of the weight, must be <= {show(100 * self.limits.initial_weight)} %, "
                f"or the statistics were recomputed by update_bn; momentum {show(momentum_that_settles(counter))} "
                "would do",
                measured={
                    "initial weight": Quantity(weight, "fraction"),
                    "num_batches_tracked": Quantity(counter, "batches"),
                },
                threshold={"initial weight": Quantity(self.limits.initial_weight, "fraction")},
            )

    CLEAN = (
        Case("1000 updates", of),
        Case("44 updates", lambda: of(num_batches_tracked=44)),
        Case("cumulative average of 3", lambda: of(num_batches_tracked=3, momentum=None)),
        Case("no counter", lambda: of(num_batches_tracked=None)),
        Case("counter 0, yet trained", lambda: of(num_batches_tracked=0)),
        Case("counter 2, yet variance 0.4", lambda: of(num_batches_tracked=2)),
        Case("settled, as data shows", lambda: of(num_batches_tracked=2, running_var=(2, 2, 2, 2), settled=True)),
        Case("never updated is BN104", lambda: network(untrained(), untrained("b", num_batches_tracked=5))),
    )
    BROKEN = (
        Case(
            "momentum 0.001 for 90 steps",
            lambda: network(
                healthy("a", running_var=(1.1, 0.95, 1.3, 1.0), num_batches_tracked=90, momentum=0.001), healthy("b")
            ),
            layers=("a",),
            measured={"initial weight": 0.999**90, "num_batches_tracked": 90},
        ),
        Case(
            "one batch of a constant",
            lambda: of(running_var=tuple(np.full(4, np.float32(0.9), dtype=np.float64)), num_batches_tracked=1),
            layers=("bn",),
            measured={"initial weight": 0.9},
        ),
    )
