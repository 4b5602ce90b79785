"""BN114: denormal weight or running variance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits, in_channels, show
from bnlab.observe.evidence import NetworkState
from bnlab.observe.float_formats import FLOAT_FORMATS
from bnlab.records import Finding, Quantity

__all__ = ["DenormalValues"]

_SMALLEST_NORMAL = {name: 0.0 if one.is_for_storage else one.smallest_normal for name, one in FLOAT_FORMATS.items()}
"""Numbers of 8 bits are widened before any computation, so that they are never denormal in it."""


class DenormalValues(Check[NoLimits]):
    """Denormal weight or running variance.

    ## What it does
    The check looks for values above 0 and below the smallest normal number of the dtype they are stored in.

    ## Why it matters
    Many CPUs take a slow path for denormals, which is up to a hundred times slower. GPUs and
    `torch.set_flush_denormal(True)` replace denormals by 0, so the same file gives slightly different results. Weight
    decay on a dead channel ends at such values.

    ## Evidence
    The check reads `weight` and `running_var` as stored.

    ## Threshold
    The threshold is the smallest normal number: 1.2e-38 in float32 and bfloat16, 6.1e-5 in float16.

    ## Remedy
    `manual`: set the weight to 0, or prune the channel.

    ## Sources
    IEEE 754; torch.set_flush_denormal (https://pytorch.org/docs/stable/generated/torch.set_flush_denormal.html).
    """

    code, group, needs = "BN114", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = "denormals are slow on CPUs that handle them in microcode, and other devices replace them by 0"
    limits = NoLimits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer with denormal values."""
        columns = {"weight": np.abs(evidence.weight), "running_var": np.abs(evidence.running_var)}
        smallest = {
            "weight": evidence.spread([_SMALLEST_NORMAL[layer.affine_dtype] for layer in evidence.layers]),
            "running_var": evidence.spread([_SMALLEST_NORMAL[layer.dtype] for layer in evidence.layers]),
        }
        denormal = {name: (column > 0) & (column < smallest[name]) for name, column in columns.items()}
        for layer, part, channels in evidence.where(denormal["weight"] | denormal["running_var"]):
            affected = [name for name in columns if denormal[name][part].any()]
            worst = {name: float(columns[name][part][denormal[name][part]].min()) for name in affected}
            values = " and ".join(f"abs({name}) is {show(value)}" for name, value in worst.items())
            normal = {name: float(smallest[name][part][0]) for name in affected}
            yield self.finding(
                layer,
                f"{values} {in_channels(channels, layer)}, normal numbers begin at {show(max(normal.values()))}",
                channels=channels,
                measured={f"abs({name})": Quantity(value, _unit(name)) for name, value in worst.items()},
                threshold={f"abs({name})": Quantity(value, _unit(name)) for name, value in normal.items()},
            )

    CLEAN = (
        Case("trained", of),
        Case("zero is normal", lambda: of(weight=(0, 1, 1, 1))),
        Case("small, still normal", lambda: of(running_var=(1.3e-38, 1, 1, 1))),
    )
    BROKEN = (
        Case("decayed", lambda: of(weight=(1, 1e-40, 1, 1)), ("bn",), (1,), {"abs(weight)": 1e-40}),
        Case("half", lambda: of(running_var=(3e-5, 1, 1, 1), dtype="float16"), ("bn",), (0,)),
    )


def _unit(name: str) -> str:
    return "output" if name == "weight" else "input^2"
