"""BN110: values that float16 cannot hold, and means beside which half precision loses the signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState, Pruned
from bnlab.records import Finding, Quantity

__all__ = ["OverflowsHalf"]

_ONES = (1, 1, 1, 1)
_UNITS = {"running_mean": "input", "running_var": "input^2", "weight": "output", "bias": "output"}


@dataclass(frozen=True)
class Limits:
    """Limits of BN110."""

    largest: float = limit(65504.0, unit="any", source="largest finite float16; up to 65519 still rounds down to it")
    bfloat16: float = limit(
        50.0, unit="abs(mean) / std", source="rounding errors of 0.08 standard deviations; real channels have up to 27"
    )
    float16: float = limit(
        400.0,
        unit="abs(mean) / std",
        source="the same error: 3 more bits in the significand make the steps 8 times finer",
    )
    dead_weight: float = limit(1e-3, unit="output", source="as in BN108: a dead channel has no signal to lose")
    float32: float = limit(83886.0, unit="abs(mean) / std", source="BN111 reports a mean that float32 loses as well")


class OverflowsHalf(Check[Limits]):
    """Values that become inf once they are cast to float16, or means beside which half precision loses the signal.

    ## What it does
    The check looks for finite statistics and parameters beyond the range of float16. It also looks for means so large
    beside the standard deviation that bfloat16 or float16 loses what float32 keeps.

    ## Why it matters
    In float32 the network is right. After `.half()` or an export to float16, a running_var of inf makes the channel
    constant, and nothing reports it. Networks that take raw pixels of 0..255 or raw audio are the usual case. Inputs
    near a large mean are rounded to its steps: at 100 standard deviations, bfloat16 changes the normalised output by
    0.17 standard deviations, and by 0.25 if the mean is rounded too.

    ## Evidence
    The check reads `running_mean`, `running_var`, `weight` and `bias` as stored, and eps (assumed to be 1e-5 unless
    stated). It leaves out the means of dead channels, and of pruned ones if the model was run: they have no signal to
    lose. BN111 judges the means of layers whose statistics are stored in half precision.

    ## Threshold
    The threshold is the largest finite float16. The check does not report values that round down to it. A dtype with p
    bits in the significand rounds an input near m with a root mean square error of about 0.74 abs(m) 2^(1-p)/sqrt(12),
    in the mean over all m. p is 8 for bfloat16 and 11 for float16, so 50 and 400 standard deviations both give 0.08
    standard deviations. None of 193,378 channels of 25 real files exceeds 27.3.

    ## Remedy
    `manual`: keep the statistics and the input of the layer in float32, subtract a constant from the input of the
    network, or fold the layer before the cast.

    ## Sources
    coreai-torch pull request 54 (https://github.com/apple/coreai-torch/pull/54); IEEE 754 binary16;
    docs/background.md, "Floating-point precision".
    """

    code, group, needs = "BN110", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "a cast to half precision makes the value inf, or rounds the signal away beside a large mean"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a value or a mean that half precision cannot hold."""
        columns = {name: np.abs(getattr(evidence, name)) for name in _UNITS}
        # Half a unit in the last place beyond the largest value still rounds down to it.
        largest = self.limits.largest * (1 + 2.0**-12)
        over = {name: np.isfinite(column) & (column >= largest) for name, column in columns.items()}
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = columns["running_mean"] * evidence.inv_std
            lost = (ratio > self.limits.bfloat16) & (ratio <= self.limits.float32)
        lost &= (columns["weight"] > self.limits.dead_weight) & ~evidence.pruned
        lost &= evidence.spread([layer.dtype in ("float32", "float64") for layer in evidence.layers]) > 0
        for layer, part, channels in evidence.where(np.logical_or.reduce([*over.values(), lost])):
            texts, measured, threshold = [], {}, {}
            for name, mask in over.items():
                if mask[part].any():
                    worst = float(columns[name][part][mask[part]].max())
                    measured[f"abs({name})"] = Quantity(worst, _UNITS[name])
                    threshold["largest float16"] = Quantity(self.limits.largest, "any")
            if measured:
                values = " and ".join(f"{name} is up to {show(one.value)}" for name, one in measured.items())
                beyond = tuple(np.flatnonzero(np.logical_or.reduce([mask[part] for mask in over.values()])).tolist())
                texts.append(f"{values} {in_channels(beyond, layer)}, float16 ends at {self.limits.largest:g}")
            if lost[part].any():
                worst = float(ratio[part][lost[part]].max())
                measured["abs(mean)/std"] = Quantity(worst, "ratio")
                threshold |= {name: Quantity(getattr(self.limits, name), "ratio") for name in ("bfloat16", "float16")}
                where = in_channels(tuple(np.flatnonzero(lost[part]).tolist()), layer)
                texts.append(
                    f"abs(mean)/std is up to {show(worst)} {where}, must be <= {show(self.limits.bfloat16)} in "
                    f"bfloat16 and <= {show(self.limits.float16)} in float16"
                )
            yield self.finding(layer, "; ".join(texts), channels=channels, measured=measured, threshold=threshold)

    CLEAN = (
        Case("trained", of),
        Case("rounds down to the largest", lambda: of(running_var=(65519.0, 1, 1, 1))),
        Case("inf is BN101", lambda: of(running_var=(np.inf, 1, 1, 1))),
        Case("27 standard deviations", lambda: of(running_mean=(27, 0, 0, 0), running_var=_ONES)),
        Case("far from zero, and as wide", lambda: of(running_mean=(1e3, 0, 0, 0), running_var=(1600, 1, 1, 1))),
        Case("BN111 reports it", lambda: of(running_mean=(6e4, 0, 0, 0), running_var=(0.1, 1, 1, 1))),
        Case("BN111 judges half", lambda: of(running_mean=(60, 0, 0, 0), running_var=_ONES, dtype="bfloat16")),
        Case("dead", lambda: of(running_mean=(60, 0, 0, 0), running_var=_ONES, weight=(0, 1, 1, 1))),
        Case("pruned", lambda: of(running_mean=(5, 0, 0, 0), running_var=(0, 1, 1, 1), pruned=Pruned((0,), ("fc",)))),
    )
    BROKEN = (
        Case(
            "raw pixels",
            lambda: of(running_var=(1, 89549.0, 1, 1)),
            layers=("bn",),
            channels=(1,),
            measured={"abs(running_var)": 89549.0},
        ),
        Case(
            "a mean of 60 standard deviations",
            lambda: of(running_mean=(0, -120, 0, 0), running_var=(1, 4, 1, 1)),
            layers=("bn",),
            channels=(1,),
            measured={"abs(mean)/std": 120 / np.sqrt(4 + 1e-5)},
        ),
        Case("rounds up", lambda: of(running_mean=(-65520.0, 0, 0, 0)), ("bn",), (0,), {"abs(running_mean)": 65520.0}),
    )
