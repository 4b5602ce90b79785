"""BN104: running statistics that are still their initial values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bnlab.checks.cases import healthy, network, of, untrained
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits
from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.records import Finding, Quantity
from bnlab.wording import TRAINED_WITH

__all__ = ["StatisticsNeverUpdated"]


class StatisticsNeverUpdated(Check[NoLimits]):
    """Running statistics that were never updated.

    ## What it does
    The check looks for layers whose `running_mean` is 0 and whose `running_var` is 1 in every channel.

    ## Why it matters
    These are the initial values of a new layer. With them, the layer does not normalise in eval mode. There are two
    explanations. Either the layer never saw a batch in train mode: it was never trained, always frozen, has momentum 0,
    or is a copy without its buffers. Then a network that was trained in train mode is at chance in eval mode. Or the
    network was always run in eval mode and its weights fit the initial values. Then recalibration would destroy it.

    ## Evidence
    The check reads `running_mean` and `running_var` as stored. The finding reports `num_batches_tracked`, which decides
    nothing.

    ## Threshold
    The values are exactly 0 and exactly 1 in every channel.

    ## Remedy
    `recalibrate`. Keep the result only if the metric does not get worse.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10 (missing updates); docs/background.md, "Statistics that were
    never updated".
    """

    code, group, needs = "BN104", Group.SUSPICIOUS, Needs.STATE
    remedies = ("recalibrate",)
    why = "these are the initial values: in eval mode the layer does not normalise its input at all"
    limits = NoLimits()

    def lacks(self, layer: LayerState) -> str | None:
        """Return the reason why initial values are right."""
        return TRAINED_WITH if layer.trained_with else None

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer at its initial values."""
        initial = (evidence.running_mean == 0) & (evidence.running_var == 1)
        for layer, _, channels in evidence.where(initial):
            if len(channels) < layer.channels:
                continue
            counter = layer.num_batches_tracked
            counted = "" if counter is None else f", num_batches_tracked is {counter}"
            yield self.finding(
                layer,
                f"running_mean is 0 and running_var is 1 in all {layer.channels} channels{counted}",
                measured={"channels at their initial values": Quantity(layer.channels, "count")},
                threshold={"channels at their initial values": Quantity(layer.channels, "count")},
            )

    CLEAN = (
        Case("trained", of),
        Case("one channel by chance", lambda: of(running_mean=(0, 1, 1, 1), running_var=(1, 2, 2, 2))),
        Case("updated, with a counter of 0", lambda: of(num_batches_tracked=0)),
    )
    BROKEN = (
        Case(
            "never trained",
            lambda: network(untrained("a"), untrained("b", num_batches_tracked=None)),
            layers=("a", "b"),
            measured={"channels at their initial values": 4},
        ),
        Case(
            "momentum 0 for 500 steps",
            lambda: network(healthy("a"), replace(untrained("b"), num_batches_tracked=500)),
            layers=("b",),
        ),
    )
