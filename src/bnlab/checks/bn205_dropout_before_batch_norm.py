"""BN205: dropout in front of batch normalization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import executed, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["DropoutBeforeBatchNorm"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN205."""

    ratio: float = limit(
        0.9, unit="variance without dropout / with it, or its inverse", source="5 % in the scale of the output"
    )


class DropoutBeforeBatchNorm(ModelCheck[Limits]):
    """Dropout in front of a BN layer, with no other BN layer in between.

    ## What it does
    The check looks for dropout upstream of each layer in the executed graph. With data it also measures the variance of
    the layer's input without dropout, relative to that with dropout.

    ## Why it matters
    Dropout raises the variance in train mode, and the running statistics learn the raised variance. In eval mode
    dropout is off. With keep probability p and mean 0 the variance falls to p times the running one, and every layer
    behind gets the error. A DenseNet on CIFAR-100 fell from 77.4 to 68.6 % accuracy with dropout 0.5 in each
    bottleneck.

    ## Evidence
    The check uses the graph of one forward pass on an example. With data it takes the median over channels of the ratio
    of within-batch variances, with every BN layer on batch statistics. Wide or correlated layers in between bring the
    ratio close to 1. The ratio therefore decides where there is data, and the structure alone where there is none.

    ## Threshold
    The check reports a ratio below `ratio` or above 1/`ratio`.

    ## Remedy
    `recalibrate`, which runs with dropout off; or `manual`: move dropout behind the last BN layer.

    ## Sources
    Li, Chen, Hu and Yang 2019 (arXiv 1801.05134), figure 1 (variance shift); mlcolvar pull request 205
    (https://github.com/luigibonati/mlcolvar/pull/205); docs/background.md, "Dropout before batch normalization".
    """

    code, group, needs = "BN205", Group.SUSPICIOUS, Needs.EXAMPLE
    remedies = ("recalibrate", "manual")
    why = "the running variance contains the noise of dropout, which is absent in eval mode"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why dropout cannot be judged."""
        return "not run on the example" if layer.execution is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with dropout before it."""
        for layer in evidence.layers:
            if layer.execution is None or layer.execution.dropout is None:
                continue
            owner = layer.execution.dropout or "the model"
            upstream = f"dropout in {owner} is upstream with no batch normalization in between"
            ratio = _ratio(layer)
            if ratio is None:
                yield self.finding(
                    layer,
                    f"{upstream}, must be behind the last BN layer",
                    measured={"dropout upstream": Quantity(1, "layers")},
                    threshold={"dropout upstream": Quantity(0, "layers")},
                )
            elif not self.limits.ratio <= ratio <= 1 / self.limits.ratio:
                yield self.finding(
                    layer,
                    f"{upstream}: the variance without dropout is {show(ratio)} times that with dropout, "
                    f"must be >= {show(self.limits.ratio)} and <= {show(1 / self.limits.ratio)}",
                    measured={"variance ratio": Quantity(ratio, "ratio")},
                    threshold={"variance ratio": Quantity(self.limits.ratio, "ratio")},
                )

    CLEAN = (
        Case("no dropout", model),
        Case("diluted by a wide layer in between", lambda: _dropped((0.83, 2.1, 0.41, 1.15))),
        Case("not run", lambda: model(model_layer(execution=None))),
    )
    BROKEN = (
        Case(
            "dropout 0.5 directly in front",
            lambda: _dropped((1.6, 4.0, 0.8, 2.2)),
            layers=("bn",),
            measured={"variance ratio": 0.5},
        ),
        Case(
            "no data",
            lambda: model(model_layer(execution=executed(dropout="drop"), data=None, train_data=None)),
            layers=("bn",),
            measured={"dropout upstream": 1},
        ),
        Case("nothing but dead channels", lambda: _dropped((0, 0, 0, 0)), layers=("bn",)),
    )


def _ratio(layer: ModelLayer) -> float | None:
    """Return the median over living channels of the variance without dropout over that with it."""
    reference = layer.train_data or layer.data
    if reference is None or layer.dropped is None:
        return None
    with np.errstate(all="ignore"):
        ratios = reference.within_var / layer.dropped.within_var
    alive = np.isfinite(ratios) & (ratios > 0)
    return float(np.median(ratios[alive])) if alive.any() else None


def _dropped(var: tuple[float, ...]) -> ModelEvidence:
    return model(model_layer(execution=executed(dropout="drop"), dropped=observed(var=var)))
