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
        1e-3, unit="output", source="a thousandth of the spread a channel is born with; decay leaves 1e-4 and below"
    )


class DeadChannel(Check[Limits]):
    """A channel whose weight is near zero.

    ## What it does
    Looks for channels with an abs(weight) so small that the output hardly varies.

    ## Why it matters
    The channel is a constant, its bias, whatever its input: it can be pruned together with the filter that feeds it.
    Usually weight decay on `weight` did it, or a residual branch that was zero-initialised and never learned.

    ## Evidence
    `weight` as stored.

    ## Threshold
    abs(weight) is the standard deviation of the channel's output.

    ## Remedy
    `manual`: prune the channel, or take `weight` out of the weight decay.

    ## Sources
    Frankle 2021: about a third of the features of a network that trains BN alone are disabled.
    """

    code, group, needs = "BN108", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "the channel is a constant whatever its input, and can be pruned"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with dead channels."""
        for layer, part, channels in evidence.where(np.abs(evidence.weight) < self.limits.weight):
            smallest = float(np.abs(evidence.weight[part][list(channels)]).min())
            yield self.finding(
                layer,
                f"abs(weight) is down to {show(smallest)} {in_channels(channels, layer)}, "
                f"a channel counts as alive from {show(self.limits.weight)}",
                channels=channels,
                measured={"abs(weight)": Quantity(smallest, "output")},
                threshold={"abs(weight)": Quantity(self.limits.weight, "output")},
            )

    CLEAN = (Case("trained", of), Case("without affine", lambda: of(weight=None, bias=None)))
    BROKEN = (
        Case("decayed", lambda: of(weight=(1, -4e-6, 1, 2e-4)), ("bn",), (1, 3), {"abs(weight)": 4e-6}),
        Case("zero-initialised", lambda: of(weight=(0, 0, 0, 0)), ("bn",), (0, 1, 2, 3), {"abs(weight)": 0.0}),
    )
