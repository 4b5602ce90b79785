"""BN107: one channel amplifies far more than the others of its layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState, Pruned
from bnlab.records import Finding, Quantity

__all__ = ["AmplifyingChannel"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN107."""

    ratio: float = limit(
        10.0,
        unit="times the layer's median gain",
        source="largest in twelve real networks: 5.8, except for channels with a variance below 3e-5, which reach 392; "
        "docs/background.md lists these networks",
    )
    dead_weight: float = limit(
        1e-3, unit="output", source="as in BN108: the gain of a dead channel is not typical of its layer"
    )


class AmplifyingChannel(Check[Limits]):
    """A channel that amplifies far more than the others of its layer.

    ## What it does
    The check compares the gain of every channel, abs(weight)/sqrt(running_var + eps), with the median gain of its
    layer.

    ## Why it matters
    The channel was nearly constant on the training data. On other data it may vary, and then its output blows up: the
    layer multiplies a change of the input by hundreds. Folding the layer into a convolution widens the range of the
    weights, which harms int8 and float16.

    ## Evidence
    The check reads `running_var` and `weight` as stored, and eps (assumed to be 1e-5 unless stated). The median is
    taken over the channels that are not dead. If the model was run, the check leaves out pruned channels: all weights
    that compute them are 0, so their input never varies.

    ## Threshold
    The limit applies to the ratio of the gain to the median.

    ## Remedy
    `manual`: look at what feeds the channel. A larger eps bounds its gain, and so does pruning.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10; Nagel et al. 2019 (arXiv 1906.04721) on the ranges of folded
    weights; docs/background.md, "Channels that hardly vary".
    """

    code, group, needs = "BN107", Group.SUSPICIOUS, Needs.STATE
    remedies = ("manual",)
    why = "the channel was nearly constant in training: it blows up on data where it varies, and spoils int8 ranges"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a channel far above the median gain."""
        gain = np.where(evidence.pruned, np.nan, evidence.gain)
        alive = np.where(np.abs(evidence.weight) > self.limits.dead_weight, gain, np.nan)
        medians = evidence.spread([np.nan if range_ is None else range_[1] for range_ in evidence.ranges(alive)])
        with np.errstate(invalid="ignore", over="ignore"):
            far_above = gain > self.limits.ratio * medians
        for layer, part, channels in evidence.where(far_above):
            largest, median = float(gain[part][list(channels)].max()), float(medians[part][0])
            yield self.finding(
                layer,
                f"gain is {show(largest)} {in_channels(channels, layer)}, {show(largest / median)} times the layer's "
                f"median, must be <= {show(self.limits.ratio)} times",
                channels=channels,
                measured={
                    "gain": Quantity(largest, "output/input"),
                    "gain / median": Quantity(largest / median, "ratio"),
                },
                threshold={"gain / median": Quantity(self.limits.ratio, "ratio")},
            )

    CLEAN = (
        Case("trained", of),
        Case("most channels dead", lambda: of(weight=(1e-6, 1e-5, 1e-6, 1.0))),
        Case("all channels dead", lambda: of(weight=(1e-6, 1e-4, 1e-9, 0.0))),
        Case("negative variance is BN102", lambda: of(running_var=(-1.0, 1, 1, 1))),
        Case("pruned", lambda: of(running_var=(1, 1, 1, 0), pruned=Pruned((3,), ("conv",)))),
    )
    BROKEN = (
        Case(
            "constant input",
            lambda: of(running_var=(1, 1, 1, 1e-12), weight=(1, 1, 1, 1)),
            layers=("bn",),
            channels=(3,),
            measured={"gain": 1 / np.sqrt(1e-12 + 1e-5)},
        ),
        Case(
            "a channel beside pruned ones, whose gain is not typical",
            lambda: of(running_var=(1, 1, 1e-12, 0), weight=(1, 1, 1, 1), pruned=Pruned((3,), ("conv",))),
            layers=("bn",),
            channels=(2,),
        ),
    )
