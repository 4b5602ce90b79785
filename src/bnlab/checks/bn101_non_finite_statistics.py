"""BN101: NaN or inf among the running statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnlab.checks.cases import healthy, network, of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits, in_channels, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["NonFiniteStatistics"]


class NonFiniteStatistics(Check[NoLimits]):
    """NaN or inf in `running_mean` or `running_var`.

    ## What it does
    The check looks for stored statistics that are not finite.

    ## Why it matters
    In eval mode every output of the channel is NaN or a constant. Train mode still looks fine, so the damage shows in
    validation alone. One batch with a NaN or inf is enough, and the buffers never recover. With mixed precision, the
    gradient scaler skips the optimizer step of such a batch, but the running statistics are updated nevertheless.

    ## Evidence
    The check reads `running_mean` and `running_var` as stored.

    ## Threshold
    There is none: a single value counts.

    ## Remedy
    `recalibrate` helps because the weights are usually intact. Find the batch that was not finite as well.

    ## Sources
    PyTorch issues 88474 (https://github.com/pytorch/pytorch/issues/88474), 90342
    (https://github.com/pytorch/pytorch/issues/90342) and 1206 (https://github.com/pytorch/pytorch/issues/1206);
    docs/background.md, "NaN and inf".
    """

    code, group, needs = "BN101", Group.CORRECTNESS, Needs.STATE
    remedies = ("recalibrate",)
    why = "in eval mode the output of the channel is NaN or a constant, and no later batch can repair the buffer"
    limits = NoLimits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with a value that is not finite."""
        columns = {"running_mean": evidence.running_mean, "running_var": evidence.running_var}
        bad = {name: ~np.isfinite(column) for name, column in columns.items()}
        for layer, part, channels in evidence.where(bad["running_mean"] | bad["running_var"]):
            worst = {name: columns[name][part][bad[name][part]] for name in columns if bad[name][part].any()}
            values = " and ".join(f"{name} is {show(column[0])}" for name, column in worst.items())
            yield self.finding(
                layer,
                f"{values} {in_channels(channels, layer)}, must be finite",
                channels=channels,
                measured={
                    name: Quantity(float(column[0]), "input" if name == "running_mean" else "input^2")
                    for name, column in worst.items()
                },
                threshold={"non-finite values": Quantity(0, "count")},
            )

    CLEAN = (Case("trained", of), Case("huge but finite", lambda: of(running_var=(3e38, 1, 1, 1))))
    BROKEN = (
        Case(
            "one inf batch",
            lambda: network(
                healthy("a"),
                healthy("b", running_mean=(0, np.inf, 0, 0), running_var=(1, np.nan, 1, 1)),
            ),
            layers=("b",),
            channels=(1,),
            measured={"running_mean": np.inf, "running_var": np.nan},
        ),
        Case("half overflow", lambda: of(running_var=(1, 1, 1, np.inf)), ("bn",), (3,), {"running_var": np.inf}),
    )
