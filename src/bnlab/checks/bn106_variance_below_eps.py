"""BN106: running variance below eps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["VarianceBelowEps"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN106."""

    ratio: float = limit(1.0, unit="running_var / eps", source="below it eps is the larger term under the root")


class VarianceBelowEps(Check[Limits]):
    """Running variance below eps.

    ## What it does
    Looks for channels whose `running_var` is smaller than the eps that is added to it.

    ## Why it matters
    eps, not the data, sets the scale: the channel is not normalised to unit variance, and another eps (1e-3 in Keras
    and TensorFlow, 1e-5 in torch) changes the output. Harmless where the channel is dead, as most are; a port or an
    export that changes eps changes the others.

    ## Evidence
    `running_var` as stored, and eps. A state dict does not hold eps: 1e-5 is assumed and said, unless it is stated
    (`--eps`). Negative variances are BN102.

    ## Threshold
    eps itself.

    ## Remedy
    `manual`: keep eps when porting; prune the channel if it is dead.

    ## Sources
    Wu and Johnson 2021, appendix A.10 (division by tiny variance); Keras BatchNormalization (epsilon 1e-3).
    """

    code, group, needs = "BN106", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "eps, not the data, sets the scale of the channel: another eps changes the output"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a variance below eps."""
        below = (evidence.running_var >= 0) & (evidence.running_var < self.limits.ratio * evidence.eps)
        for layer, part, channels in evidence.where(below):
            smallest = float(evidence.running_var[part][list(channels)].min()) + 0.0  # -0.0 reads badly
            eps = layer.hyperparameters.eps
            assumed = "an assumed eps" if "eps" in layer.hyperparameters.assumed else "eps"
            yield self.finding(
                layer,
                f"running_var is {show(smallest)} {in_channels(channels, layer)}, below {assumed} of {show(eps)}",
                channels=channels,
                measured={"running_var": Quantity(smallest, "input^2")},
                threshold={"running_var": Quantity(self.limits.ratio * eps, "input^2")},
            )

    CLEAN = (Case("trained", of), Case("small, above eps", lambda: of(running_var=(2e-5, 1, 1, 1))))
    BROKEN = (
        Case("vanished", lambda: of(running_var=(1, 3e-18, 1, 1)), ("bn",), (1,), {"running_var": 3e-18}),
        Case("large eps", lambda: of(running_var=(1, 1, 1, 5e-4), eps=1e-3), ("bn",), (3,), {"running_var": 5e-4}),
    )
