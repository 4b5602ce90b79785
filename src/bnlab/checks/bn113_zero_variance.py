"""BN113: running variance of exactly zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits, in_channels, show
from bnlab.observe.evidence import LayerState, NetworkState, Pruned
from bnlab.records import Finding, Level, Quantity
from bnlab.wording import enumerated

__all__ = ["ZeroVariance"]

_WHY_PRUNED = "nothing can vary in these channels: they output a constant, and can be removed with their filters"


class ZeroVariance(Check[NoLimits]):
    """Running variance of exactly zero.

    ## What it does
    The check looks for a `running_var` that is 0.

    ## Why it matters
    The channel was constant in so many batches that even the initial 1 decayed to 0: its filter is dead or its input is
    constant. Or the buffer was overwritten: a recalibration that never ran the layer leaves 0. The gain is
    abs(weight)/sqrt(eps), which is 316 times the weight at 1e-5. It applies to whatever varies in this channel later.

    ## Evidence
    The check reads `running_var` and `weight` as stored, and eps (assumed to be 1e-5 unless stated). If the model was
    run, the check also knows which channels are pruned: all weights that compute their input are 0, so nothing can vary
    in them. A layer in which only pruned channels have a variance of 0 gets a note. A layer with nothing but pruned
    channels gets a warning, because a whole convolution of zeros may be an error.

    ## Threshold
    The value is exactly 0.

    ## Remedy
    `manual`: remove the channel. If whole layers are at 0, the buffer was overwritten: `recalibrate`.

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
            pruned = () if layer.pruned is None else layer.pruned.channels
            amplifying = tuple(channel for channel in channels if channel not in pruned)
            if amplifying:
                yield self._amplifier(layer, float(np.abs(evidence.weight[part][list(amplifying)]).max()), amplifying)
            else:
                yield self._pruned(layer, channels)

    def _amplifier(self, layer: LayerState, weight: float, channels: tuple[int, ...]) -> Finding:
        """Report channels that amplify whatever varies in them later."""
        eps = layer.hyperparameters.eps
        gain = weight / math.sqrt(eps) if eps > 0 else math.inf
        return self.finding(
            layer,
            f"running_var is exactly 0 {in_channels(channels, layer)}, gain up to {show(gain)}",
            channels=channels,
            measured={"running_var": Quantity(0.0, "input^2"), "gain": Quantity(gain, "output/input")},
            threshold={"running_var": Quantity(0.0, "input^2")},
        )

    def _pruned(self, layer: LayerState, channels: tuple[int, ...]) -> Finding:
        """Report channels in which nothing can vary, because their weights are 0."""
        assert layer.pruned is not None
        whole = len(layer.pruned.channels) == layer.channels
        producers = enumerated(layer.pruned.producers, 3)
        weights = f"all weights of {producers} are 0" if whole else f"all weights of {producers} for them are 0"
        finding = self.finding(
            layer,
            f"running_var is exactly 0 {in_channels(channels, layer)}, which are pruned: {weights}",
            channels=channels,
            measured={"running_var": Quantity(0.0, "input^2")},
            threshold={"running_var": Quantity(0.0, "input^2")},
            level=None if whole else Level.INFO,
        )
        return replace(finding, why=_WHY_PRUNED, remedies=("manual",))

    CLEAN = (
        Case("trained", of),
        Case("tiny is BN106", lambda: of(running_var=(1e-30, 1, 1, 1))),
        Case("pruned and not recalibrated", lambda: of(pruned=Pruned((1,), ("conv",)))),
    )
    BROKEN = (
        Case(
            "dead filter",
            lambda: of(running_var=(1, 0.0, 1, 1), weight=(1, 0.5, 1, 1)),
            layers=("bn",),
            channels=(1,),
            measured={"running_var": 0.0, "gain": 0.5 / np.sqrt(1e-5)},
        ),
        Case(
            "pruned on purpose",
            lambda: of(running_var=(1, 0.0, 0.0, 1), pruned=Pruned((1, 2), ("conv",))),
            layers=("bn",),
            channels=(1, 2),
        ),
        Case(
            "one channel is pruned, and another is not",
            lambda: of(running_var=(1, 0.0, 0.0, 1), weight=(1, 3, 0.5, 1), pruned=Pruned((1,), ("conv",))),
            layers=("bn",),
            channels=(2,),
            measured={"gain": 0.5 / np.sqrt(1e-5)},
        ),
    )
