"""BN501: a variance that the layer cannot represent."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity
from bnlab.wording import out_of

__all__ = ["VarianceOverflow"]


class VarianceOverflow(ModelCheck[NoLimits]):
    """A batch variance that overflows in the layer's own arithmetic.

    ## What it does
    The check counts the batches with finite input whose statistics, as the layer computes them, are not finite.

    ## Why it matters
    The sum of squared deviations leaves the range of its dtype. In float32 this happens from a standard deviation of
    about 1e19 on, and earlier where many values are summed in float32 (3e17 for 4096 values). In float16 it happens
    from 256 on. 1/std is then 0 and the output is constant. Nothing reports it, and the loss stands still. The running
    variance becomes inf for good.

    ## Evidence
    The check compares the layer's own statistics of the batches of `data` with float64 ones. It needs layers that
    return their statistics in float32 or float64.

    ## Threshold
    There is none: a variance is finite or not.

    ## Remedy
    `manual`: scale the input, keep the layer in float32, or convert it to `bnlab.nn`, whose sums do not overflow.

    ## Sources
    PyTorch issue 162489 (https://github.com/pytorch/pytorch/issues/162489), with zeros on the CPU and NaN on CUDA, and
    pull request 178123 (https://github.com/pytorch/pytorch/pull/178123); docs/background.md, "Floating-point
    precision"; the experiment `huge-gap` of the lab (docs/lab.md), in which the loss stays at 0.5 from inputs of 1e20
    on.
    """

    code, group, needs = "BN501", Group.CORRECTNESS, Needs.DATA
    remedies = ("manual",)
    why = "1/std becomes 0: the output is constant whatever the input, and the running variance is lost"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to judge."""
        return "not run on finite data" if layer.data is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer whose variance overflows."""
        for layer in evidence.layers:
            if layer.data is None or not layer.data.overflowed:
                continue
            count, total = layer.data.overflowed, layer.data.batches
            yield self.finding(
                layer,
                f"batch variance overflows in {out_of(count, total, 'batch', 'batches')}, must be finite",
                measured={"overflowed": Quantity(count, "batches")},
                threshold={"overflowed": Quantity(0, "batches")},
            )

    CLEAN = (
        Case("ordinary", model),
        Case("large, and finite", lambda: model(model_layer(data=observed(var=(1e36, 1e35, 1e37, 1e36))))),
        Case("the input itself is not finite", lambda: model(model_layer(data=observed(not_finite=3)))),
        Case("no data", lambda: model(model_layer(data=None))),
    )
    BROKEN = (
        Case(
            "a standard deviation of 1e20",
            lambda: model(
                model_layer("a", data=observed(var=(1e40, 1e40, 1e40, 1e40), overflowed=20)), model_layer("b")
            ),
            layers=("a",),
            measured={"overflowed": 20},
        ),
    )
