"""BN113: running variance of exactly zero."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits, in_channels, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["ZeroVariance"]


class ZeroVariance(Check[NoLimits]):
    """Running variance of exactly zero.

    ## What it does
    The check looks for a `running_var` that is 0.

    ## Why it matters
    The channel was constant in so many batches that even the initial 1 decayed to 0: its filter is dead or its input is
    constant. Or the buffer was overwritten: a recalibration that never ran the layer leaves 0. The gain is
    abs(weight)/sqrt(eps), which is 316 times the weight at 1e-5. It applies to whatever varies in this channel later.

    ## Evidence
    The check reads `running_var` and `weight` as stored, and eps (assumed to be 1e-5 unless stated).

    ## Threshold
    The value is exactly 0.

    ## Remedy
    `manual`: prune the channel. If whole layers are at 0, the buffer was overwritten: `recalibrate`.

    ## Sources
    Yolo-FastestV2 has a variance of 0 in two channels (docs/background.md, "Real networks that the thresholds were
    checked on"). The precise BN of fvcore leaves 0 in layers that were not run. docs/background.md, "Channels that
    hardly vary".
    """

    code, group, needs = "BN113", Group.SUSPICIOUS, Needs.STATE
    remedies = ("manual", "recalibrate")
    why = "the channel never varied, or its buffer was overwritten; its gain is abs(weight)/sqrt(eps)"
    limits = NoLimits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a variance of zero."""
        for layer, part, channels in evidence.where(evidence.running_var == 0):
            weight = float(np.abs(evidence.weight[part][list(channels)]).max())
            eps = layer.hyperparameters.eps
            gain = weight / math.sqrt(eps) if eps > 0 else math.inf
            yield self.finding(
                layer,
                f"running_var is exactly 0 {in_channels(channels, layer)}, gain up to {show(gain)}",
                channels=channels,
                measured={"running_var": Quantity(0.0, "input^2"), "gain": Quantity(gain, "output/input")},
                threshold={"running_var": Quantity(0.0, "input^2")},
            )

    CLEAN = (Case("trained", of), Case("tiny is BN106", lambda: of(running_var=(1e-30, 1, 1, 1))))
    BROKEN = (
        Case(
            "dead filter",
            lambda: of(running_var=(1, 0.0, 1, 1), weight=(1, 0.5, 1, 1)),
            layers=("bn",),
            channels=(1,),
            measured={"running_var": 0.0, "gain": 0.5 / np.sqrt(1e-5)},
        ),
    )
