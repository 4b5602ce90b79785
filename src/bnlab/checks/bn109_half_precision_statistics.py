"""BN109: running statistics kept in float16, bfloat16 or a format of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import healthy, network, of
from bnlab.checks.check import Case, Check, Group, Needs, limit
from bnlab.observe.evidence import NetworkState
from bnlab.observe.float_formats import FLOAT_FORMATS
from bnlab.records import Finding, Quantity

__all__ = ["HalfPrecisionStatistics"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN109."""

    mantissa_bits: float = limit(23, unit="bits", source="float32: what torch keeps unless the layer itself is cast")


class HalfPrecisionStatistics(Check[Limits]):
    """Running statistics in half precision, or less.

    ## What it does
    The check looks for `running_mean` and `running_var` in float16, bfloat16 or one of the float8 formats.

    ## Why it matters
    An update is momentum times the difference. It is rounded away as soon as it is below half a unit in the last
    place of the stored value: in bfloat16 with momentum 0.001, a running mean on its way to 5 stops at 2. In
    float16 a variance above 65504 becomes inf. A float8 keeps two or three bits of a number. Such statistics come
    from `.half()` or `.bfloat16()` on a whole network, and show in eval mode alone.

    ## Evidence
    The check reads the stored dtype.

    ## Threshold
    The mantissa must have at least the bits of float32.

    ## Remedy
    Cast the layer back to float32, then `recalibrate`. The cast alone keeps the wrong values.

    ## Sources
    apex pull request 144 (https://github.com/NVIDIA/apex/pull/144): converting the moments to half "hurts the accuracy
    ... and occasionally results in NaNs". docs/background.md, "Floating-point precision".
    """

    code, group, needs = "BN109", Group.SUSPICIOUS, Needs.STATE
    remedies = ("recalibrate",)
    why = (
        "updates below half a unit in the last place are lost: the statistics stop before they reach those of the data"
    )
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer in half precision."""
        for layer in evidence.layers:
            bits = FLOAT_FORMATS[layer.dtype].mantissa_bits
            if bits < self.limits.mantissa_bits:
                yield self.finding(
                    layer,
                    f"running statistics are stored in {layer.dtype}, must be float32 or wider",
                    measured={"mantissa": Quantity(bits, "bits")},
                    threshold={"mantissa": Quantity(self.limits.mantissa_bits, "bits")},
                )

    CLEAN = (
        Case("float32", of),
        Case("float64", lambda: of(dtype="float64")),
        Case("half weights only", lambda: of(affine_dtype="bfloat16")),
    )
    BROKEN = (
        Case(
            "cast to half",
            lambda: network(healthy("a", dtype="float16"), healthy("b", dtype="bfloat16"), healthy("c")),
            layers=("a", "b"),
            measured={"mantissa": 10},
        ),
        Case("cast to float8", lambda: of(dtype="float8_e4m3fn"), layers=("bn",), measured={"mantissa": 3}),
    )
