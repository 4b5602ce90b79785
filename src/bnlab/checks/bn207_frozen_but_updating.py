"""BN207: weight and bias are frozen, the statistics are not."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity
from bnlab.wording import TRAINED_WITH

__all__ = ["FrozenButUpdating"]


class FrozenButUpdating(ModelCheck[NoLimits]):
    """A layer whose weight and bias are frozen while its running statistics change.

    ## What it does
    The check looks for a layer that has no trainable weight or bias, is in train mode and updates its statistics.

    ## Why it matters
    `requires_grad = False` freezes parameters. Batch normalization itself is frozen by eval mode. In train mode the
    layer still normalises with the batch and updates its buffers, under `no_grad` too. A pretrained part that should be
    frozen drifts to the new data, and results change with the batch size. Often the next `model.train()` undid
    `freeze().eval()`.

    ## Evidence
    The check reads `requires_grad` of weight and bias, `training`, `momentum` and `track_running_stats`. In a model in
    eval mode, frozen parameters alone prove nothing. The check then speaks where other parameters train, the statistics
    of all such layers are those of `train_data` (BN401), and statistics that are recomputed for these weights lower the
    loss on `train_data` by more than two standard errors. Running statistics that lag behind the weights were updated
    with them, whereas weights that were trained with the stored statistics fit these best. A layer with such weights is
    frozen in effect, and the check skips it. It also skips a layer without weight and bias, because nothing shows
    whether it should be frozen. With momentum 0 nothing changes (BN203).

    ## Threshold
    There must be no update.

    ## Remedy
    `freeze`, which survives the `train()` of a parent.

    ## Sources
    PyTorch issues 86590 (https://github.com/pytorch/pytorch/issues/86590) and 66073
    (https://github.com/pytorch/pytorch/issues/66073); Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10 (what
    "freeze" means); chemprop pull request 952 (https://github.com/chemprop/chemprop/pull/952); docs/background.md,
    "Frozen layers".
    """

    code, group, needs = "BN207", Group.SUSPICIOUS, Needs.MODEL
    remedies = ("freeze",)
    why = "requires_grad does not freeze running statistics: the layer drifts to whatever it is trained on"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why nothing shows whether the layer should be frozen."""
        if layer.trained_with:
            return TRAINED_WITH
        return "no weight or bias" if layer.affine_trains is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with frozen parameters and running statistics that change."""
        for layer in evidence.layers:
            updates = layer.training and layer.updates and not layer.frozen and layer.momentum != 0
            if layer.affine_trains is False and (updates or layer.trained_by_batch):
                fault = (
                    "train mode updates the running statistics"
                    if updates
                    else ("the loss shows that train mode updated the running statistics")
                )
                yield self.finding(
                    layer,
                    f"weight and bias are frozen, but {fault}, must be in eval mode or frozen as a whole",
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
        Case("trained with its statistics", lambda: _frozen(trained_with=True)),
    )
    BROKEN = (
        Case("requires_grad_(False), then train()", lambda: _frozen(), layers=("bn",), measured={"updates": 1}),
        Case(
            "in eval mode, with weights that were trained with its batches",
            lambda: _frozen(training=False, trained_by_batch=True),
            layers=("bn",),
        ),
        Case(
            "cumulative average in one of two",
            lambda: model(model_layer("a"), model_layer("b", affine_trains=False, momentum=None)),
            layers=("b",),
        ),
    )


def _frozen(**changes: object) -> ModelEvidence:
    return model(model_layer("bn", affine_trains=False, **changes))
