"""BN211: the optimizer decays weight or bias of batch normalization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity
from bnlab.wording import abridged, out_of

__all__ = ["WeightDecayOnAffine"]

_MAX_NAMES = 3


@dataclass(frozen=True)
class Limits:
    """Limits of BN211."""

    decay: float = limit(0.0, unit="weight decay", source="the check asks whether there is any decay, not how much")


class WeightDecayOnAffine(ModelCheck[Limits]):
    """Weight decay on weight or bias of BN layers.

    ## What it does
    The check looks up the weight decay of the parameter groups of every weight and bias.

    ## Why it matters
    Decay draws a weight towards 0 and closes the channels that matter little to the loss. Decay on the convolution in
    front of BN acts differently: BN is invariant to the scale of the convolution, and the decay sets the effective
    learning rate. Most recipes exempt BN, and most optimizers that get `model.parameters()` do not. Good networks were
    trained either way, so the finding is a note.

    ## Evidence
    The check reads `param_groups` of the optimizer. It skips a layer whose weight and bias are not in them or are not
    trained.

    ## Threshold
    The check reports any decay above 0. There is one finding for the network, because the decay is usually the same for
    all layers.

    ## Remedy
    `manual`: put weight and bias into a parameter group of their own with `weight_decay=0`, or decay the weight towards
    1.

    ## Sources
    Summers and Dinneen 2020 (arXiv 1906.03548), who decay the weight towards 1; van Laarhoven 2017 (arXiv 1706.05350);
    rule TA402 of torch-audit (https://github.com/RMalkiv/torch-audit, RULES.md); network-slimming issue 46
    (https://github.com/Eric-mingjie/network-slimming/issues/46); docs/background.md, "Weight decay".
    """

    code, group, needs = "BN211", Group.NOTE, Needs.OPTIMIZER
    remedies = ("manual",)
    why = "decay towards 0 closes channels, and most recipes exempt batch normalization from weight decay"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to decay."""
        if layer.affine_trains is None:
            return "no weight or bias"
        if not layer.affine_trains:
            return "weight and bias are not trained"
        return None if layer.decay else "weight and bias are not in the optimizer"

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for a network with decay on some layers."""
        decays = {layer.name: _decay(layer) for layer in evidence.layers}
        decayed = {name: decay for name, decay in decays.items() if decay > self.limits.decay}
        if not decayed:
            return
        names = "" if len(decayed) == len(decays) else f" ({abridged(list(decayed), _MAX_NAMES)})"
        yield self.finding(
            None,
            f"weight decay of {show(max(decayed.values()))} applies to weight or bias of "
            f"{out_of(len(decayed), len(decays), 'layer')}{names}, must be <= {show(self.limits.decay)}",
            measured={
                "weight decay": Quantity(max(decayed.values()), "1"),
                "layers": Quantity(len(decayed), "layers"),
            },
            threshold={"weight decay": Quantity(self.limits.decay, "1")},
        )

    CLEAN = (
        Case("no optimizer", model),
        Case("a group of its own", lambda: model(model_layer(decay={"weight": 0.0, "bias": 0.0}))),
        Case("not in the optimizer", lambda: model(model_layer(decay={}))),
        Case("not trained", lambda: model(model_layer(decay={"weight": 1e-4}, affine_trains=False))),
        Case("another parameter of the layer", lambda: model(model_layer(decay={"weight": 0.0, "alpha": 1e-2}))),
    )
    BROKEN = (
        Case(
            "one group for all",
            lambda: model(*(model_layer(n, decay={"weight": 5e-4, "bias": 5e-4}) for n in "abc")),
            layers=(None,),
            measured={"weight decay": 5e-4, "layers": 3},
        ),
        Case(
            "bias of one layer",
            lambda: model(
                model_layer("a", decay={"weight": 0.0, "bias": 0.0}),
                model_layer("b", decay={"weight": 0, "bias": 0.01}),
            ),
            layers=(None,),
            measured={"weight decay": 0.01, "layers": 1},
        ),
    )


def _decay(layer: ModelLayer) -> float:
    return max((layer.decay or {}).get(name, 0.0) for name in ("weight", "bias"))
