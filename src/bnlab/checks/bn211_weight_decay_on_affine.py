"""BN211: the optimizer decays weight or bias of batch normalization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["WeightDecayOnAffine"]

_MOST_NAMES = 3


@dataclass(frozen=True)
class Limits:
    """Limits of BN211."""

    decay: float = limit(0.0, unit="weight decay", source="whether it decays at all, not how much, is the question")


class WeightDecayOnAffine(ModelCheck[Limits]):
    """Weight decay on weight or bias of BN layers.

    ## What it does
    Looks up the weight decay of the parameter group each weight and bias is in.

    ## Why it matters
    A weight drawn towards 0 shuts its channel, and what reaches the loss through it: a channel that is little used
    dies. Decay on the convolution before BN does something else: BN is invariant to its scale, and the decay sets the
    effective learning rate. Most recipes exempt BN; most optimizers, given `model.parameters()`, do not. Good networks
    were trained either way, so this is a note.

    ## Evidence
    `param_groups` of the optimizer. A layer whose weight and bias are not in it, or do not train, is skipped.

    ## Threshold
    Any decay above 0. One finding for the network, as it is the same for all layers as a rule.

    ## Remedy
    `manual`: put weight and bias into a parameter group of their own with `weight_decay=0`, or draw the weight to 1.

    ## Sources
    Summers and Dinneen 2020 (decay of the weight towards 1); van Laarhoven 2017; torch-audit TA402;
    network-slimming issue 46; F25 of the failure modes.
    """

    code, group, needs = "BN211", Group.NOTE, Needs.OPTIMIZER
    remedies = ("manual",)
    why = "weights drawn towards 0 shut their channels; most recipes exempt batch normalization from weight decay"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return why there is nothing to decay."""
        if layer.affine_trains is None:
            return "no weight or bias"
        if not layer.affine_trains:
            return "weight and bias are not trained"
        return None if layer.decay else "weight and bias are not in the optimizer"

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for a network with decay on some layers."""
        decays = {layer.name: _decay(layer) for layer in evidence.layers}
        found = {name: decay for name, decay in decays.items() if decay > self.limits.decay}
        if not found:
            return
        several = "s" if len(decays) > 1 else ""
        names = "" if len(found) == len(decays) else f" ({_some(list(found))})"
        yield self.finding(
            None,
            f"weight decay of {show(max(found.values()))} applies to weight or bias of {len(found)} of {len(decays)} "
            f"layer{several}{names}, must be <= {show(self.limits.decay)}",
            measured={
                "weight decay": Quantity(max(found.values()), "1"),
                "layers": Quantity(len(found), "layers"),
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


def _some(names: list[str]) -> str:
    return ", ".join([*names[:_MOST_NAMES], *(["..."] if len(names) > _MOST_NAMES else [])])
