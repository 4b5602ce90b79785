"""BN213: a BN layer that its model does not know."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, StrayLayer
from bnlab.records import Finding, Quantity

__all__ = ["UnregisteredLayer"]


class UnregisteredLayer(ModelCheck[NoLimits]):
    """A BN layer that runs in train mode after `model.eval()`, because the model does not hold it as a module.

    ## What it does
    The check runs the example after `model.eval()` and looks for BN layers that run although they are not among
    `model.modules()`, such as layers in a plain list.

    ## Why it matters
    `eval()`, `to()`, `parameters()` and `state_dict()` do not reach such a layer. It normalises with the batch in eval
    mode, it is not trained, and no checkpoint holds it.

    ## Evidence
    The check sees every module that runs. A layer in eval mode causes no finding, because a frozen teacher may be kept
    in a list on purpose. No other check judges unregistered layers.

    ## Threshold
    No such layer may be in train mode after `model.eval()`.

    ## Remedy
    `manual`: put the layers into `nn.ModuleList` or `nn.ModuleDict`, or assign each of them to an attribute.

    ## Sources
    The documentation of `torch.nn.ModuleList`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html); docs/background.md, "Outputs that depend
    on the batch".
    """

    code, group, needs = "BN213", Group.CORRECTNESS, Needs.EXAMPLE
    remedies = ("manual",)
    why = "eval(), to(), parameters() and state_dict() do not reach the layer: it normalises with the batch"
    limits = NoLimits()

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per attribute with such layers."""
        places: dict[tuple[str, str | None], list[StrayLayer]] = {}
        for layer in evidence.unregistered:
            if layer.training:
                places.setdefault((layer.parent, layer.attribute), []).append(layer)
        for layers in places.values():
            yield self.finding(
                None,
                _message(layers[0], len(layers)),
                measured={"unregistered layers in train mode": Quantity(len(layers), "layers")},
                threshold={"unregistered layers in train mode": Quantity(0, "layers")},
            )

    CLEAN = (
        Case("registered", model),
        Case("a frozen teacher in a list", lambda: model(unregistered=(_layer(training=False),))),
    )
    BROKEN = (
        Case(
            "two layers in a plain list",
            lambda: model(unregistered=(_layer(), _layer())),
            layers=(None,),
            measured={"unregistered layers in train mode": 2},
        ),
        Case("a layer that is held elsewhere", lambda: model(unregistered=(_layer(attribute=None),)), layers=(None,)),
    )


def _message(layer: StrayLayer, count: int) -> str:
    parent = f"{layer.parent} ({layer.parent_kind})" if layer.parent else f"the model ({layer.parent_kind})"
    if layer.attribute is None:
        place = "layers that are not registered" if count > 1 else "a layer that is not registered"
    elif layer.container is None:
        place = f"the attribute `{layer.attribute}`, which is not registered"
    else:
        place = f"the plain {layer.container} `{layer.attribute}`, which is not registered"
    layers = f"{count} {layer.kind} layers" if count > 1 else f"a {layer.kind} layer"
    still, pronoun = ("they are", "they") if count > 1 else ("it is", "it")
    return (
        f"{parent} runs {layers} from {place}: {still} in train mode after model.eval(); {pronoun} must be in an "
        "nn.ModuleList or another registered module"
    )


def _layer(*, training: bool = True, attribute: str | None = "norms") -> StrayLayer:
    return StrayLayer(
        kind="BatchNorm2d",
        parent="",
        parent_kind="Net",
        attribute=attribute,
        container=None if attribute is None else "list",
        training=training,
    )
