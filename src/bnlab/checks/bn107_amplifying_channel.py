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

_ONES = (1, 1, 1, 1)


@dataclass(frozen=True)
class Limits:
    """Limits of BN107."""

    ratio: float = limit(
        10.0,
        unit="times the layer's median gain",
        source="most layers of real networks stay below 6, and depthwise layers of published ones reach 71",
    )
    near_eps: float = limit(
        3.0, unit="running_var / eps", source="the weakest real case has 2.5; eps then changes the gain by 15 % or more"
    )
    lead: float = limit(
        2.0,
        unit="times the largest gain of other channels",
        source="the real cases have 2.3 to 173, and depthwise layers of a published network have 1.9 at most",
    )
    dead_weight: float = limit(
        1e-3, unit="output", source="as in BN108: the gain of a dead channel is not typical of its layer"
    )


class AmplifyingChannel(Check[Limits]):
    """A channel that was nearly constant in training, and amplifies far more than the others of its layer.

    ## What it does
    The check looks for channels whose variance is near eps, and compares their gain, abs(weight)/sqrt(running_var +
    eps), with the gains of the other channels.

    ## Why it matters
    The channel was nearly constant on the training data. On other data it may vary, and then its output blows up: the
    layer multiplies a change of the input by hundreds. Folding the layer into a convolution widens the range of the
    weights, which harms int8 and float16.

    ## Evidence
    The check reads `running_var` and `weight` as stored, and eps (assumed to be 1e-5 unless stated). A small filter has
    a small variance and amplifies nothing. If the model was run, and a convolution or linear layer feeds the BN layer
    directly, each gain is therefore multiplied by the norm of the filter of its channel. A filter that is divided by 10
    leaves this product as it is. If the model was run, the check also leaves out pruned channels. BN113 reports a
    variance of exactly 0. The median is taken over the channels that are not dead.

    ## Threshold
    The check reports a channel if its variance is below `near_eps` times eps, its gain is above `ratio` times the
    median, and above `lead` times the largest gain of the channels with a larger variance. A large gain alone is no
    fault: in depthwise layers each filter reads another input, and 158 channels of one published text recogniser
    (PP-OCRv3) have 10 to 71 times the median. The ratio alone would report 85 layers of 25 real files. The check
    reports 14, or 6 where it knows the filters: these hold 12 channels that really are nearly constant. The other 8 are
    in MobileNet v2 and EfficientNet-Lite1.

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
        """Yield one finding per layer with a nearly constant channel far above the gains of the others."""
        gain = np.where(evidence.pruned, np.nan, evidence.gain * evidence.filter_norms)
        alive = (np.abs(evidence.weight) > self.limits.dead_weight) & (evidence.filter_norms > 0)
        nearly_constant = (evidence.running_var > 0) & (evidence.running_var < self.limits.near_eps * evidence.eps)
        typical = evidence.ranges(np.where(alive, gain, np.nan))
        others = evidence.ranges(np.where(alive & ~nearly_constant & (evidence.running_var > 0), gain, np.nan))
        median = evidence.spread([np.nan if range_ is None else range_[1] for range_ in typical])
        largest = evidence.spread([np.nan if range_ is None else range_[2] for range_ in others])
        with np.errstate(invalid="ignore", over="ignore"):
            far_above = (gain > self.limits.ratio * median) & (gain > self.limits.lead * largest)
        for layer, part, channels in evidence.where(far_above & nearly_constant):
            own = gain[part][list(channels)] / median[part][0]
            smallest, bare = (column[part][list(channels)] for column in (evidence.running_var, evidence.gain))
            eps, norms = self.limits.near_eps * layer.hyperparameters.eps, layer.filter_norms is not None
            yield self.finding(
                layer,
                f"running_var is {show(float(smallest.min()))} {in_channels(channels, layer)}, must be >= {show(eps)}, "
                f"and gain is {show(float(bare.max()))}, {show(float(own.max()))} times the layer's median"
                f"{' with the norms of the filters' if norms else ''}, must be <= {show(self.limits.ratio)} times",
                channels=channels,
                measured={
                    "running_var": Quantity(float(smallest.min()), "input^2"),
                    "gain": Quantity(float(bare.max()), "output/input"),
                    "gain / median": Quantity(float(own.max()), "ratio"),
                },
                threshold={
                    "running_var": Quantity(eps, "input^2"),
                    "gain / median": Quantity(self.limits.ratio, "ratio"),
                },
            )

    CLEAN = (
        Case("trained", of),
        Case("most channels dead", lambda: of(weight=(1e-6, 1e-5, 1e-6, 1.0))),
        Case("all channels dead", lambda: of(weight=(1e-6, 1e-4, 1e-9, 0.0))),
        Case("negative variance is BN102", lambda: of(running_var=(-1.0, 1, 1, 1))),
        Case("variance 0 is BN113", lambda: of(running_var=(0, 1, 1, 1))),
        Case("pruned", lambda: of(running_var=(1, 1, 1, 1e-9), pruned=Pruned((3,), ("conv",)))),
        Case("features in other units", lambda: of(running_var=(1e8, 1e4, 1e6, 0.04), weight=_ONES)),
        Case("a depthwise layer of many gains", lambda: of(running_var=(1, 0.5, 1e-4, 2e-5), weight=(1, 1, 2, 1))),
        Case("a small filter", lambda: of(running_var=(1, 1, 1, 1e-5), weight=_ONES, filter_norms=(2, 2, 2, 0.01))),
    )
    BROKEN = (
        Case(
            "constant input",
            lambda: of(running_var=(1, 1, 1, 1e-12), weight=_ONES),
            layers=("bn",),
            channels=(3,),
            measured={"gain": 1 / np.sqrt(1e-12 + 1e-5)},
        ),
        Case(
            "a filter of the usual size on a constant input",
            lambda: of(running_var=(1, 1, 1, 1e-12), weight=_ONES, filter_norms=(2, 2, 2, 1)),
            layers=("bn",),
            channels=(3,),
        ),
        Case(
            "a channel beside pruned ones, whose gain is not typical",
            lambda: of(running_var=(1, 1, 1e-12, 0), weight=_ONES, pruned=Pruned((3,), ("conv",))),
            layers=("bn",),
            channels=(2,),
        ),
    )
