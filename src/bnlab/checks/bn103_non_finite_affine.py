"""BN103: NaN or inf in weight or bias."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits, in_channels, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["NonFiniteAffine"]


class NonFiniteAffine(Check[NoLimits]):
    """NaN or inf in `weight` or `bias`.

    ## What it does
    The check looks for affine parameters that are not finite.

    ## Why it matters
    The output of the channel is NaN or inf in both modes. Training diverged before this checkpoint was written.

    ## Evidence
    The check reads `weight` and `bias` as stored.

    ## Threshold
    There is none: a single value counts.

    ## Remedy
    `manual`: go back to a checkpoint from before the divergence. Statistics cannot repair parameters.

    ## Sources
    BJDD_CVPR21 issue 4 (https://github.com/sharif-apu/BJDD_CVPR21/issues/4) reports published weights with NaN.
    """

    code, group, needs = "BN103", Group.CORRECTNESS, Needs.STATE
    remedies = ("manual",)
    why = "the output of the channel is NaN or inf in both modes: training diverged before the file was written"
    limits = NoLimits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a parameter that is not finite."""
        columns = {"weight": evidence.weight, "bias": evidence.bias}
        bad = {name: ~np.isfinite(column) for name, column in columns.items()}
        for layer, part, channels in evidence.where(bad["weight"] | bad["bias"]):
            worst = {name: float(columns[name][part][bad[name][part]][0]) for name in columns if bad[name][part].any()}
            values = " and ".join(f"{name} is {show(value)}" for name, value in worst.items())
            yield self.finding(
                layer,
                f"{values} {in_channels(channels, layer)}, must be finite",
                channels=channels,
                measured={name: Quantity(value, "output") for name, value in worst.items()},
                threshold={"non-finite values": Quantity(0, "count")},
            )

    CLEAN = (Case("trained", of), Case("without affine", lambda: of(weight=None, bias=None)))
    BROKEN = (
        Case("diverged", lambda: of(weight=(1, np.nan, 1, 1)), ("bn",), (1,), {"weight": np.nan}),
        Case("bias only", lambda: of(weight=None, bias=(0, 0, -np.inf, 0)), ("bn",), (2,), {"bias": -np.inf}),
    )
