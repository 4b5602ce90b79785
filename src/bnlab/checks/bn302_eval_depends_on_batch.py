"""BN302: in eval mode a sample's output depends on the samples beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import MixingModule, ModelEvidence
from bnlab.records import Finding, Quantity

__all__ = ["EvalDependsOnBatch"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN302."""

    change: float = limit(
        0.02,
        unit="std of the outputs",
        source="kernels for other batch sizes round differently: up to 1e-3 in bfloat16",
    )


class EvalDependsOnBatch(ModelCheck[Limits]):
    """A network whose eval output for a sample changes with the other samples of the batch.

    ## What it does
    The check runs the first batch of `data` in eval mode, then its first half alone, and compares the outputs of these
    samples.

    ## Why it matters
    Predictions depend on how requests are batched, and single ones may be wrong. A registered BN layer is not the
    reason, because the check keeps all of them in eval mode. Something else mixes the samples: BN computed by hand from
    batch statistics, attention or a mean over the batch, or a BN layer that the model does not hold as a module.

    ## Evidence
    The check compares outputs of the network. It names the first module, in the order of execution, whose input is the
    same and whose output differs between the half and the whole batch. If a BN layer has no running statistics, this is
    the reason (BN209), and the check does not run.

    ## Threshold
    The limit is far above the rounding differences between batch sizes.

    ## Remedy
    `manual`: find the operation that reduces over the batch.

    ## Sources
    PyTorch issue 1051 (https://github.com/pytorch/pytorch/issues/1051); docs/background.md, "Outputs that depend on the
    batch".
    """

    code, group, needs = "BN302", Group.SUSPICIOUS, Needs.DATA
    remedies = ("manual",)
    why = "predictions depend on how samples are batched"
    limits = Limits()

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for a network that mixes samples."""
        change = evidence.mixing
        if change is not None and change > self.limits.change:
            yield self.finding(
                None,
                f"in eval mode, outputs change by up to {show(change)} of their standard deviation without the other "
                f"half of the batch, must be <= {show(self.limits.change)}{_where(evidence.mixing_module)}",
                measured={"change": Quantity(change, "std")},
                threshold={"change": Quantity(self.limits.change, "std")},
            )

    CLEAN = (
        Case("independent", lambda: model(mixing=1e-6)),
        Case("half precision", lambda: model(mixing=1e-3)),
        Case("unknown: a layer without running statistics", lambda: model(model_layer(state=None), mixing=None)),
    )
    BROKEN = (
        Case(
            "a mean over the batch",
            lambda: model(
                mixing=0.4, mixing_module=MixingModule(name="pool", kind="MeanPool", is_batch_norm=False, is_leaf=True)
            ),
            layers=(None,),
            measured={"change": 0.4},
        ),
        Case("a place that is not known", lambda: model(mixing=0.4), layers=(None,)),
    )


def _where(module: MixingModule | None) -> str:
    """Name the module that mixes the samples, if it is known."""
    if module is None:
        return "; something other than a registered BN layer mixes the samples"
    name = f"{module.name} ({module.kind})" if module.name else f"the model ({module.kind})"
    if module.is_batch_norm:
        return f"; BN in {name} mixes the samples"
    if not module.is_leaf:
        return f"; the own forward of {name} mixes the samples"
    return f"; {name}, which is no BN layer, mixes the samples"
