"""BN204: momentum or eps differ between layers of one network."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.records import Finding, Quantity
from bnlab.wording import abridged, counted

__all__ = ["MixedHyperparameters"]

_MAX_VALUES = 4
_MAX_NAMES = 3


class MixedHyperparameters(ModelCheck[NoLimits]):
    """Layers of one network with different momentum or eps.

    ## What it does
    The check groups the layers by momentum and by eps. It reports the value that most layers have, and the layers with
    other values.

    ## Why it matters
    Many networks are assembled from parts. A backbone that was ported with eps 1e-3 may have heads with torch's 1e-5,
    or a change of momentum may have missed a part. A layer that runs with eps2 and was trained with eps1 is off by the
    factor sqrt((var + eps1)/(var + eps2)), which is largest where the variance is small. Different values on purpose
    are fine.

    ## Evidence
    The check reads `momentum` of the layers that update their statistics, and `eps` of all layers. It compares six
    digits, so that 1 - 0.9 counts as 0.1 and a float32 1e-5 as 1e-5.

    ## Threshold
    All layers must have one momentum and one eps.

    ## Remedy
    `manual`: check that each part has the values that it was trained with.

    ## Sources
    torchao issue 4107 (https://github.com/pytorch/ao/issues/4107), in which eps and momentum were overwritten and mAP
    fell from 47 to 43; docs/background.md, "Conventions of other frameworks".
    """

    code, group, needs = "BN204", Group.NOTE, Needs.MODEL
    judges_modules = True
    remedies = ("manual",)
    why = "unless different values are meant, a port or a change missed some layers"
    limits = NoLimits()

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for each hyperparameter that differs."""
        updating = [layer for layer in evidence.layers if layer.updates and not layer.frozen]
        yield from self._judge("momentum", {layer.name: layer.momentum for layer in updating})
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
            f"{value} in {counted(len(names), 'layer')} ({abridged(names, _MAX_NAMES)})"
            for value, names in others[: _MAX_VALUES - 1]
        ]
        more = len(groups) - _MAX_VALUES
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
