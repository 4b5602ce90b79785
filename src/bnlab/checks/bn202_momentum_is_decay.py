"""BN202: a decay where torch wants the weight of the new batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.conventions import LARGE_MOMENTUM
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["MomentumIsDecay"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN202."""

    momentum: float = limit(
        LARGE_MOMENTUM, unit="weight of the new batch", source="above it at most 3 batches are averaged"
    )


class MomentumIsDecay(ModelCheck[Limits]):
    """A momentum that looks like the decay of another framework.

    ## What it does
    The check looks for a momentum above 0.5 and below 1.

    ## Why it matters
    In torch, momentum is the weight of the new batch. In TensorFlow, Keras and Paddle it is the weight of the old
    value. With 0.9 or 0.99 from there, the running statistics are those of the last batch or two: they average (2 -
    a)/a batches, which is 1.2 at 0.9. Results in eval mode then change with the last batch.

    ## Evidence
    The check reads `momentum` of the layers that update their statistics. None is fine, because it is a cumulative
    average. 1 is fine, because it keeps the last batch and serves to copy statistics on purpose.

    ## Threshold
    The check reports 0.5 < momentum < 1.

    ## Remedy
    `set-momentum` turns the decay d into 1 - d. Recalibrate a network that was trained with the decay.

    ## Sources
    PyTorch issue 15298 (https://github.com/pytorch/pytorch/issues/15298); pytorch/examples issue 289
    (https://github.com/pytorch/examples/issues/289), where a decay of 0.9 is torch's 0.1; ludwig pull request 2100
    (https://github.com/ludwig-ai/ludwig/pull/2100), which corrects such a default; Paddle pull request 51120
    (https://github.com/PaddlePaddle/Paddle/pull/51120), which corrects a kernel that mixed up the two;
    docs/background.md, "Conventions of other frameworks".
    """

    code, group, needs = "BN202", Group.SUSPICIOUS, Needs.MODEL
    judges_modules = True
    remedies = ("set-momentum",)
    why = "torch's momentum is the weight of the new batch: the running statistics are those of the last batch or two"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why momentum has no effect."""
        return "its statistics are not updated" if layer.frozen or not layer.updates else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with such a momentum."""
        for layer in evidence.layers:
            momentum = layer.momentum
            if momentum is None or not self.limits.momentum < momentum < 1:
                continue
            yield self.finding(
                layer,
                f"momentum is {momentum:g}, must be <= {show(self.limits.momentum)} or 1; a decay of {momentum:g} is "
                f"torch's {show(1 - momentum)}",
                measured={
                    "momentum": Quantity(momentum, "fraction"),
                    "batches averaged": Quantity((2 - momentum) / momentum, "batches"),
                },
                threshold={"momentum": Quantity(self.limits.momentum, "fraction")},
            )

    CLEAN = (
        Case("torch's default", model),
        Case("0.5", lambda: model(model_layer(momentum=0.5))),
        Case("1 copies the last batch", lambda: model(model_layer(momentum=1.0))),
        Case("cumulative average", lambda: model(model_layer(momentum=None))),
        Case("frozen", lambda: model(model_layer(momentum=0.99, frozen=True, updates=False))),
    )
    BROKEN = (
        Case(
            "0.99 from Keras",
            lambda: model(model_layer("a", momentum=0.99), model_layer("b")),
            layers=("a",),
            measured={"momentum": 0.99, "batches averaged": 1.01 / 0.99},
        ),
        Case("0.9 everywhere", lambda: model(*(model_layer(n, momentum=0.9) for n in "ab")), layers=("a", "b")),
    )
