"""BN203: a momentum of 0."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["MomentumZero"]


class MomentumZero(ModelCheck[NoLimits]):
    """A momentum of 0, with which the running statistics never change.

    ## What it does
    The check looks for a momentum of exactly 0 in a layer that is meant to update its statistics.

    ## Why it matters
    Train mode normalises with batch statistics as usual, but the buffers do not change. A new layer stays at mean 0 and
    variance 1, so that eval mode does not normalise at all. A pretrained layer keeps the statistics of its old data
    while its weights change. The counter goes up nevertheless. People use 0 to freeze a layer, to get the inference of
    the paper, or to get a cumulative average, which is None.

    ## Evidence
    The check reads `momentum` of the layers that update their statistics.

    ## Threshold
    The value is exactly 0.

    ## Remedy
    `manual`: set what you mean: 0.1, None for a cumulative average, or `bnlab.freeze`. Recalibrate a network that was
    trained with 0. `set-momentum` does not help, because 0 as a decay is torch's 1.

    ## Sources
    pretrained-models.pytorch issue 5 (https://github.com/Cadene/pretrained-models.pytorch/issues/5) on Inception with
    momentum 0; Lightning issue 14866 (https://github.com/Lightning-AI/pytorch-lightning/issues/14866), in which weight
    averaging set 0.0 instead of None and accuracy fell to near 0; docs/background.md, "Statistics that were never
    updated"; the experiment `momentum` of the lab (docs/lab.md).
    """

    code, group, needs = "BN203", Group.SUSPICIOUS, Needs.MODEL
    judges_modules = True
    remedies = ("manual",)
    why = "training does not change the running statistics: eval mode normalises with the initial ones or with old ones"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why momentum has no effect."""
        return "its statistics are not updated" if layer.frozen or not layer.updates else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with momentum 0."""
        for layer in evidence.layers:
            if layer.momentum == 0:
                yield self.finding(
                    layer,
                    "momentum is 0, must be > 0, or None for a cumulative average",
                    measured={"momentum": Quantity(0.0, "fraction")},
                    threshold={"momentum": Quantity(0.0, "fraction")},
                )

    CLEAN = (
        Case("torch's default", model),
        Case("tiny", lambda: model(model_layer(momentum=1e-6))),
        Case("cumulative average", lambda: model(model_layer(momentum=None))),
        Case("frozen", lambda: model(model_layer(momentum=0.0, frozen=True, updates=False))),
        Case("no running statistics", lambda: model(model_layer(momentum=0.0, state=None, updates=False))),
    )
    BROKEN = (
        Case(
            "meant as a freeze",
            lambda: model(model_layer("a", momentum=0.0), model_layer("b")),
            layers=("a",),
            measured={"momentum": 0.0},
        ),
    )
