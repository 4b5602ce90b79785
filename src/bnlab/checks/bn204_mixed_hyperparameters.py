"""BN204: momentum or eps differ between layers of one network."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.records import Finding, Quantity
from bnlab.wording import abridged, counted

__all__ = ["MixedHyperparameters"]

_MOST_VALUES = 4
_MOST_NAMES = 3


class MixedHyperparameters(ModelCheck[NoLimits]):
    """Layers of one network with different momentum or eps.

    ## What it does
    Groups the layers by momentum and by eps, and says which value the most layers have and which have another.

    ## Why it matters
    Networks are put together from parts: a backbone ported from a framework with eps 1e-3 under heads with torch's
    1e-5, or a change of momentum that missed a part. A layer that runs with another eps than it was trained with is off
    by sqrt((var + eps1)/(var + eps2)), most where the variance is small. Different values on purpose are fine.

    ## Evidence
    `momentum` of the layers that update their statistics, `eps` of all. Values are compared to six digits: 1 - 0.9 is
    0.1, and a float32 1e-5 is 1e-5.

    ## Threshold
    One value each.

    ## Remedy
    `manual`: check that the values are those the parts were trained with.

    ## Sources
    torchao issue 4107 (eps and momentum overwritten: mAP 47 to 43); F17 of the failure modes.
    """

    code, group, needs = "BN204", Group.NOTE, Needs.MODEL
    remedies = ("manual",)
    why = "parts of the network were set up differently: a port or a change that missed some layers, unless it is meant"
    limits = NoLimits()

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for each hyperparameter that differs."""
        moving = [layer for layer in evidence.layers if layer.updates and not layer.frozen]
        yield from self._judge("momentum", {layer.name: layer.momentum for layer in moving})
        yield from self._judge("eps", {layer.name: layer.eps for layer in evidence.layers})

    def _judge(self, hyperparameter: str, values: dict[str, float | None]) -> Iterator[Finding]:
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            groups.setdefault("None" if value is None else f"{value:.6g}", []).append(name)
        if len(groups) < 2:
            return
        (usual, largest_group), *others = sorted(groups.items(), key=lambda item: len(item[1]), reverse=True)
        parts = [f"{usual} in {counted(len(largest_group), 'layer')}"]
        parts += [
            f"{value} in {counted(len(names), 'layer')} ({abridged(names, _MOST_NAMES)})"
            for value, names in others[: _MOST_VALUES - 1]
        ]
        more = len(groups) - _MOST_VALUES
        parts += [counted(more, "more value")] if more > 0 else []
        yield self.finding(
            None,
            f"{hyperparameter} differs between layers: {', '.join(parts)}",
            measured={
                f"values of {hyperparameter}": Quantity(len(groups), "values"),
                f"layers with another {hyperparameter}": Quantity(len(values) - len(largest_group), "layers"),
            },
            threshold={f"values of {hyperparameter}": Quantity(1, "values")},
        )

    CLEAN = (
        Case("one layer", model),
        Case("equal", lambda: model(model_layer("a"), model_layer("b"))),
        Case("1 - 0.9", lambda: model(model_layer("a", momentum=1 - 0.9), model_layer("b", eps=9.999999747378752e-6))),
        Case(
            "momentum of a frozen layer",
            lambda: model(model_layer("a"), model_layer("b", momentum=None, frozen=True, updates=False)),
        ),
    )
    BROKEN = (
        Case(
            "a head left at torch's defaults",
            lambda: model(
                *(model_layer(f"body.{n}", momentum=0.01, eps=1e-3) for n in range(3)),
                model_layer("head.bn"),
            ),
            layers=(None, None),
            measured={"values of momentum": 2, "layers with another momentum": 1},
        ),
        Case(
            "five values of eps",
            lambda: model(*(model_layer(f"b{n}", eps=10.0**-n) for n in range(3, 8))),
            layers=(None,),
            measured={"values of eps": 5, "layers with another eps": 4},
        ),
        Case(
            "one cumulative average",
            lambda: model(model_layer("a"), model_layer("b", momentum=None)),
            layers=(None,),
        ),
    )
