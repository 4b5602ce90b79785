"""BN111: a mean so large that subtracting it loses the signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState, Pruned
from bnlab.observe.float_formats import FLOAT_FORMATS
from bnlab.records import Finding, Quantity

__all__ = ["CancellingMean"]

_COARSEST_STEP = FLOAT_FORMATS["float32"].epsilon
"""Networks run in float32, whatever stores their statistics."""


@dataclass(frozen=True)
class Limits:
    """Limits of BN111."""

    step: float = limit(
        1e-2, unit="standard deviations", source="as BN502; one rounding step of the mean, and of every input near it"
    )
    ratio: float = limit(
        10.0,
        unit="abs(mean) / std",
        source="below it the data are as coarse; the twelve real networks of docs/background.md have up to 7 commonly "
        "and 12.8 at most",
    )


class CancellingMean(Check[Limits]):
    """A running mean so large that subtracting it loses the signal.

    ## What it does
    The check compares abs(running_mean) with sqrt(running_var + eps). An input near the mean has no finer steps than
    the rounding steps of the mean itself.

    ## Why it matters
    x - mean cancels. The rest of the signal has steps of eps(dtype) * abs(mean), whatever the kernel does. If the mean
    is 100,000 times the standard deviation, float32 leaves a hundred steps per standard deviation. Kernels for
    channels_last lose far more. Time stamps, coordinates and unscaled sensor values are the usual case.

    ## Evidence
    The check reads `running_mean` and `running_var` as stored, and eps (assumed to be 1e-5 unless stated). The step is
    that of the dtype of the statistics, and at least that of float32, in which networks run. If the model was run, the
    check leaves out pruned channels: all weights that compute them are 0, so they have no signal to lose.

    ## Threshold
    The check reports a channel that exceeds both limits.

    ## Remedy
    `manual`: subtract a constant from the input before the network, or keep the layer in a wider dtype.

    ## Sources
    Chan, Golub and LeVeque 1983; IEEE 754; docs/background.md, "Floating-point precision".
    """

    code, group, needs = "BN111", Group.SUSPICIOUS, Needs.STATE
    remedies = ("manual",)
    why = "inputs near the mean are rounded so coarsely that the normalised signal is lost"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a cancelling mean."""
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = np.abs(evidence.running_mean) * evidence.inv_std
            step = ratio * evidence.spread(
                [max(FLOAT_FORMATS[layer.dtype].epsilon, _COARSEST_STEP) for layer in evidence.layers]
            )
            lost = (ratio > self.limits.ratio) & (step > self.limits.step) & ~evidence.pruned
        for layer, part, channels in evidence.where(lost):
            worst = float(ratio[part][list(channels)].max())
            coarse = float(step[part][list(channels)].max())
            yield self.finding(
                layer,
                f"abs(mean)/std is {show(worst)} {in_channels(channels, layer)}: one rounding step is {show(coarse)} "
                f"standard deviations, must be <= {show(self.limits.step)}",
                channels=channels,
                measured={
                    "abs(mean)/std": Quantity(worst, "ratio"),
                    "rounding step": Quantity(coarse, "standard deviations"),
                },
                threshold={
                    "abs(mean)/std": Quantity(self.limits.ratio, "ratio"),
                    "rounding step": Quantity(self.limits.step, "standard deviations"),
                },
            )

    CLEAN = (
        Case("trained", of),
        Case("far from zero, still fine", lambda: of(running_mean=(5e4, 0, 0, 0), running_var=(1, 1, 1, 1))),
        Case(
            "bfloat16, ordinary mean", lambda: of(running_mean=(4, 1, 1, 1), running_var=(1, 1, 1, 1), dtype="bfloat16")
        ),
        Case("pruned", lambda: of(running_mean=(500, 0, 0, 0), running_var=(0, 1, 1, 1), pruned=Pruned((0,), ("fc",)))),
    )
    BROKEN = (
        Case(
            "time stamps",
            lambda: of(running_mean=(0, 0, 1.7e9, 0), running_var=(1, 1, 1e4, 1)),
            layers=("bn",),
            channels=(2,),
            measured={"abs(mean)/std": 1.7e9 / np.sqrt(1e4 + 1e-5)},
        ),
        Case("half", lambda: of(running_mean=(64, 0, 0, 0), running_var=(1, 1, 1, 1), dtype="float16"), ("bn",), (0,)),
    )
