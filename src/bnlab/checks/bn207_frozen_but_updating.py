"""BN207: weight and bias are frozen, the statistics are not."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["FrozenButUpdating"]


class FrozenButUpdating(ModelCheck[NoLimits]):
    """A layer whose weight and bias are frozen while its running statistics move.

    ## What it does
    Looks for a layer without a trainable weight or bias that is in train mode and updates its statistics.

    ## Why it matters
    `requires_grad = False` freezes parameters; batch normalization is frozen by eval mode. In train mode the layer
    still normalises with the batch and moves its buffers, under `no_grad` too. A "frozen" pretrained part drifts to the
    new data, and results change with the batch size. Often `freeze().eval()` was undone by the next `model.train()`.

    ## Evidence
    `requires_grad` of weight and bias, `training`, `momentum` and `track_running_stats`. A layer that has neither
    weight nor bias cannot be frozen by them: skipped. Momentum 0 moves nothing (BN203).

    ## Threshold
    No update.

    ## Remedy
    `freeze`, which survives the `train()` of a parent.

    ## Sources
    PyTorch issues 86590 and 66073; Wu and Johnson 2021, appendix A.10 (what "freeze" means); chemprop issue 952; F9 of
    the failure modes.
    """

    code, group, needs = "BN207", Group.SUSPICIOUS, Needs.MODEL
    remedies = ("freeze",)
    why = "requires_grad does not freeze running statistics: the layer drifts to whatever it is trained on"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return why nothing says whether it is meant to be frozen."""
        return "no weight or bias" if layer.affine_trains is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer that is frozen by half."""
        for layer in evidence.layers:
            moves = layer.training and layer.updates and not layer.frozen and layer.momentum != 0
            if layer.affine_trains is False and moves:
                yield self.finding(
                    layer,
                    "weight and bias are frozen, yet train mode moves the running statistics, must be in eval mode or "
                    "frozen as a whole",
                    measured={"updates": Quantity(1, "per batch")},
                    threshold={"updates": Quantity(0, "per batch")},
                )

    CLEAN = (
        Case("trained as a whole", model),
        Case("frozen, in eval mode", lambda: _frozen(training=False)),
        Case("a frozen class", lambda: _frozen(frozen=True, updates=False)),
        Case("no running statistics", lambda: _frozen(state=None, updates=False)),
        Case("momentum 0 is BN203", lambda: _frozen(momentum=0.0)),
        Case("no weight and bias", lambda: model(model_layer(affine_trains=None))),
    )
    BROKEN = (
        Case("requires_grad_(False), then train()", lambda: _frozen(), layers=("bn",), measured={"updates": 1}),
        Case(
            "cumulative average in one of two",
            lambda: model(model_layer("a"), model_layer("b", affine_trains=False, momentum=None)),
            layers=("b",),
        ),
    )


def _frozen(**changes: object) -> ModelEvidence:
    return model(model_layer("bn", affine_trains=False, **changes))
