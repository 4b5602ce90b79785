"""BN108: weight near zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["DeadChannel"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN108."""

    weight: float = limit(
        1e-3, unit="output", source="a thousandth of the initial weight 1; weight decay ends at 1e-4 and below"
    )


class DeadChannel(Check[Limits]):
    """A channel whose weight is near zero.

    ## What it does
    The check looks for channels whose abs(weight) is so small that the output hardly varies.

    ## Why it matters
    The output of the channel is constant, namely its bias, whatever the input is. The channel can be pruned together
    with the filter that feeds it. Usual reasons are weight decay on `weight` and a residual branch that was initialised
    with weight 0 and never learned.

    ## Evidence
    The check reads `weight` as stored.

    ## Threshold
    The limit applies to abs(weight), which is the standard deviation of the channel's output.

    ## Remedy
    `manual`: prune the channel, or exempt `weight` from weight decay.

    ## Sources
    Frankle et al. 2021 (arXiv 2003.00152): a network that trains BN alone disables about a third of its features.
    docs/background.md, "Weight decay".
    """

    code, group, needs = "BN108", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "the output of the channel is constant whatever its input, so the channel can be pruned"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with dead channels."""
        for layer, part, channels in evidence.where(np.abs(evidence.weight) < self.limits.weight):
            smallest = float(np.abs(evidence.weight[part][list(channels)]).min())
            yield self.finding(
                layer,
                f"abs(weight) is as low as {show(smallest)} {in_channels(channels, layer)}, "
                f"must be >= {show(self.limits.weight)} in a channel that is alive",
                channels=channels,
                measured={"abs(weight)": Quantity(smallest, "output")},
                threshold={"abs(weight)": Quantity(self.limits.weight, "output")},
            )

    CLEAN = (Case("trained", of), Case("without affine", lambda: of(weight=None, bias=None)))
    BROKEN = (
        Case("decayed", lambda: of(weight=(1, -4e-6, 1, 2e-4)), ("bn",), (1, 3), {"abs(weight)": 4e-6}),
        Case("zero-initialised", lambda: of(weight=(0, 0, 0, 0)), ("bn",), (0, 1, 2, 3), {"abs(weight)": 0.0}),
    )
