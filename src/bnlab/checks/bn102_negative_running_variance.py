"""BN102: running variance below zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["NegativeRunningVariance"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN102."""

    minimum: float = limit(0.0, unit="input^2", source="a variance is a mean of squares")


class NegativeRunningVariance(Check[Limits]):
    """Running variance below zero.

    ## What it does
    The check looks for a `running_var` below zero.

    ## Why it matters
    Below -eps the square root is NaN, and eval mode raises no error. Between -eps and 0 the gain is far too large.
    Negative values come from statistics that were recomputed as E[x^2] - E[x]^2 in float32, as the precise BN of fvcore
    does, or from a moving average in half precision.

    ## Evidence
    The check reads `running_var` as stored.

    ## Threshold
    A variance cannot be negative, not even slightly.

    ## Remedy
    `recalibrate`. Never clamp the value: -1e-3 clamped to 0 gives a gain of 1/sqrt(eps) = 316.

    ## Sources
    detectron2 issue 2413 (https://github.com/facebookresearch/detectron2/issues/2413); Chan, Golub and LeVeque 1983,
    who show why E[x^2] - E[x]^2 cancels; docs/background.md, "Floating-point precision".
    """

    code, group, needs = "BN102", Group.CORRECTNESS, Needs.STATE
    remedies = ("recalibrate",)
    why = "eval mode divides by the square root of the running variance: the output is NaN, or far too large"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a negative variance."""
        below = np.isfinite(evidence.running_var) & (evidence.running_var < self.limits.minimum)
        for layer, part, channels in evidence.where(below):
            worst = float(evidence.running_var[part][list(channels)].min())
            yield self.finding(
                layer,
                f"running_var is {show(worst)} {in_channels(channels, layer)}, must be >= {show(self.limits.minimum)}",
                channels=channels,
                measured={"running_var": Quantity(worst, "input^2")},
                threshold={"running_var": Quantity(self.limits.minimum, "input^2")},
            )

    CLEAN = (Case("trained", of), Case("zero is not negative", lambda: of(running_var=(0.0, 1, 1, 1))))
    BROKEN = (
        Case(
            "cancellation",
            lambda: of(running_var=(1, -9.8e-4, 1, -1e-5)),
            layers=("bn",),
            channels=(1, 3),
            measured={"running_var": -9.8e-4},
        ),
    )
