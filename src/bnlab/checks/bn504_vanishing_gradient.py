"""BN504: almost no gradient reaches the weights in front of a BN layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import healthy, model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import Gradient, ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["VanishingGradient"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN504."""

    relative: float = limit(
        1e-4,
        unit="relative change of the loss",
        source="healthy networks have 1 and more; rounding in float32 gives 7e-6",
    )
    loss: float = limit(
        1e-3, unit="loss", source="below it the network has learnt the batch, and a small gradient is right"
    )


class VanishingGradient(ModelCheck[Limits]):
    """Weights in front of a BN layer that get almost no gradient.

    ## What it does
    The check takes the gradient of the loss at the weights of the convolution or linear layer in front of a BN layer.
    It expresses the gradient as the relative change of the loss for a relative change of the weights: norm(gradient)
    norm(weight) / loss.

    ## Why it matters
    The layer in front does not learn. BN is invariant to the scale of its weights, so that their gradient is orthogonal
    to them. Where one weight makes one channel nothing is left, and only weight and bias of the BN layer train. The
    gradient also vanishes where the variance overflows, where eps dominates, and where the activation behind is flat.
    BN eases vanishing gradients but does not abolish them.

    ## Evidence
    The check runs one batch of `data` with batch statistics, in the dtype of the model. If some layer has a weight of 0
    in every channel, as residual branches have at first, a gradient of exactly 0 elsewhere follows from it, and the
    check does not report it. It does not report any gradient where the loss is small either. It skips a gradient that
    is not finite.

    ## Threshold
    The check reports a relative change below `relative`, for a loss above `loss`.

    ## Remedy
    `manual`: look for the reason among the findings of the layers behind (BN501, BN503, BN505).

    ## Sources
    Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.3 (scale invariance); van Laarhoven 2017 (arXiv 1706.05350);
    docs/background.md, "Vanishing gradients"; the experiment `huge-gap` of the lab (docs/lab.md), in which the linear
    layer gets a gradient of about 1e-7.
    """

    code, group, needs = "BN504", Group.SUSPICIOUS, Needs.LOSS
    remedies = ("manual",)
    why = "the weights in front do not train: a step along the gradient changes the loss by less than rounding does"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is no gradient to judge."""
        if layer.gradient is None:
            return "no convolution or linear layer that trains before it, or no path from it to the loss"
        finite = abs(layer.gradient.relative) < float("inf") and abs(layer.gradient.loss) < float("inf")
        return None if finite else "loss or gradient is not finite"

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer whose producer gets no gradient."""
        closed = any(_is_closed(layer) for layer in evidence.layers)
        for layer in evidence.layers:
            gradient = layer.gradient
            if gradient is None or abs(gradient.loss) <= self.limits.loss or (closed and gradient.relative == 0):
                continue
            if gradient.relative < self.limits.relative:
                yield self.finding(
                    layer,
                    f"gradient at {gradient.producer} changes the loss by {show(gradient.relative)} of its value, "
                    f"must be >= {show(self.limits.relative)}",
                    measured={
                        "relative gradient": Quantity(gradient.relative, "fraction"),
                        "loss": Quantity(gradient.loss, "loss"),
                    },
                    threshold={
                        "relative gradient": Quantity(self.limits.relative, "fraction"),
                        "loss": Quantity(self.limits.loss, "loss"),
                    },
                )

    CLEAN = (
        Case("no gradient", model),
        Case("0.1 of the loss", lambda: model(model_layer(gradient=_gradient(0.1)))),
        Case("1e-3 of the loss", lambda: model(model_layer(gradient=_gradient(1e-3)))),
        Case("learnt", lambda: model(model_layer(gradient=_gradient(1e-9, loss=1e-5)))),
        Case("not finite", lambda: model(model_layer(gradient=_gradient(float("nan"))))),
        Case(
            "a residual branch that begins with weight 0",
            lambda: model(
                model_layer("bn1", gradient=_gradient(0.0)),
                model_layer("bn2", state=healthy("bn2", weight=(0, 0, 0, 0)), gradient=_gradient(0.0)),
            ),
        ),
    )
    BROKEN = (
        Case(
            "one weight a channel",
            lambda: model(model_layer("a", gradient=_gradient(1e-7)), model_layer("b", gradient=_gradient(0.3))),
            layers=("a",),
            measured={"relative gradient": 1e-7, "loss": 0.5},
        ),
        Case("exactly 0", lambda: model(model_layer(gradient=_gradient(0.0))), layers=("bn",)),
    )


def _is_closed(layer: ModelLayer) -> bool:
    """Whether the weight of a layer is 0 in every channel, so that nothing passes forwards or backwards."""
    return layer.state is not None and layer.state.weight is not None and not layer.state.weight.any()


def _gradient(relative: float, *, loss: float = 0.5) -> Gradient:
    return Gradient(producer="conv", relative=relative, loss=loss)
