"""BN106: running variance below eps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState, Pruned
from bnlab.records import Finding, Quantity

__all__ = ["VarianceBelowEps"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN106."""

    ratio: float = limit(1.0, unit="running_var / eps", source="below it eps is the larger term under the root")


class VarianceBelowEps(Check[Limits]):
    """Running variance below eps.

    ## What it does
    The check looks for channels whose `running_var` is smaller than the eps that is added to it.

    ## Why it matters
    eps sets the scale instead of the data. The channel is not normalised to unit variance, and another eps changes its
    output. torch uses 1e-5; Keras and TensorFlow use 1e-3. Most of these channels are dead, and then the difference is
    harmless. For the others a port or an export with another eps changes the output.

    ## Evidence
    The check reads `running_var` as stored, and eps. A state dict does not hold eps. The check assumes 1e-5 and reports
    the assumption, unless eps is stated (`--eps`). BN102 reports negative variances. If the model was run, the check
    leaves out pruned channels: all weights that compute them are 0, so no scale matters.

    ## Threshold
    The threshold is eps itself.

    ## Remedy
    `manual`: keep eps in a port. Prune the channel if it is dead.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10 (division by tiny variance); the documentation of Keras
    (https://keras.io/api/layers/normalization_layers/batch_normalization/), whose epsilon is 1e-3; docs/background.md,
    "Channels that hardly vary".
    """

    code, group, needs = "BN106", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "eps, not the data, sets the scale of the channel: another eps changes the output"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a variance below eps."""
        below = (evidence.running_var >= 0) & (evidence.running_var < self.limits.ratio * evidence.eps)
        below &= ~evidence.pruned
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

    CLEAN = (
        Case("trained", of),
        Case("small, above eps", lambda: of(running_var=(2e-5, 1, 1, 1))),
        Case("pruned", lambda: of(running_var=(1e-9, 1, 1, 1), pruned=Pruned((0,), ("conv",)))),
    )
    BROKEN = (
        Case("vanished", lambda: of(running_var=(1, 3e-18, 1, 1)), ("bn",), (1,), {"running_var": 3e-18}),
        Case("large eps", lambda: of(running_var=(1, 1, 1, 5e-4), eps=1e-3), ("bn",), (3,), {"running_var": 5e-4}),
    )
