"""BN110: values that float16 cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["OverflowsHalf"]

_UNITS = {"running_mean": "input", "running_var": "input^2", "weight": "output", "bias": "output"}


@dataclass(frozen=True)
class Limits:
    """Limits of BN110."""

    largest: float = limit(65504.0, unit="any", source="largest finite float16; up to 65519 still rounds down to it")


class OverflowsHalf(Check[Limits]):
    """Values that become inf once they are cast to float16.

    ## What it does
    The check looks for finite statistics and parameters beyond the range of float16.

    ## Why it matters
    In float32 the network is right. After `.half()` or an export to float16, a running_var of inf makes the channel
    constant, and nothing reports it. Networks that take raw pixels of 0..255 or raw audio are the usual case.

    ## Evidence
    The check reads `running_mean`, `running_var`, `weight` and `bias` as stored.

    ## Threshold
    The threshold is the largest finite float16. The check does not report values that round down to it.

    ## Remedy
    `manual`: keep the statistics in float32, as autocast does, or fold the layer before the cast.

    ## Sources
    coreai-torch pull request 54 (https://github.com/apple/coreai-torch/pull/54); IEEE 754 binary16.
    """

    code, group, needs = "BN110", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "a cast to float16 makes the value inf and the channel constant"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a value that float16 cannot hold."""
        columns = {name: np.abs(getattr(evidence, name)) for name in _UNITS}
        # Half a unit in the last place beyond the largest value still rounds down to it.
        largest = self.limits.largest * (1 + 2.0**-12)
        over = {name: np.isfinite(column) & (column >= largest) for name, column in columns.items()}
        for layer, part, channels in evidence.where(np.logical_or.reduce(list(over.values()))):
            worst = {
                name: float(columns[name][part][over[name][part]].max()) for name in _UNITS if over[name][part].any()
            }
            values = " and ".join(f"abs({name}) is up to {show(value)}" for name, value in worst.items())
            yield self.finding(
                layer,
                f"{values} {in_channels(channels, layer)}, float16 ends at {self.limits.largest:g}",
                channels=channels,
                measured={f"abs({name})": Quantity(value, _UNITS[name]) for name, value in worst.items()},
                threshold={"largest float16": Quantity(self.limits.largest, "any")},
            )

    CLEAN = (
        Case("trained", of),
        Case("rounds down to the largest", lambda: of(running_var=(65519.0, 1, 1, 1))),
        Case("inf is BN101", lambda: of(running_var=(np.inf, 1, 1, 1))),
    )
    BROKEN = (
        Case(
            "raw pixels",
            lambda: of(running_var=(1, 89549.0, 1, 1)),
            layers=("bn",),
            channels=(1,),
            measured={"abs(running_var)": 89549.0},
        ),
        Case("rounds up", lambda: of(running_mean=(-65520.0, 0, 0, 0)), ("bn",), (0,), {"abs(running_mean)": 65520.0}),
    )
