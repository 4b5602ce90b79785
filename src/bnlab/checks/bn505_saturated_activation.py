"""BN505: a sigmoid or tanh behind batch normalization in its flat part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import executed, healthy, model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.observe.evidence import Floats, LayerState, Pruned
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["SaturatedActivation"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN505."""

    sigmoid: float = limit(4.0, unit="abs(z)", source="the derivative is below 0.018, 7 % of its largest value 0.25")
    tanh: float = limit(2.5, unit="abs(z)", source="the derivative is below 0.027, 2.7 % of its largest value 1")
    mass: float = limit(0.5, unit="fraction of a channel's values", source="more than half of the values")
    channels: float = limit(0.25, unit="fraction", source="a layer may learn some saturated features")


class SaturatedActivation(ModelCheck[Limits]):
    """A sigmoid or tanh whose inputs from a BN layer lie mostly in its flat part.

    ## What it does
    The check computes, from weight and bias of the layer, the part of a channel's values that falls where the
    activation behind is flat.

    ## Why it matters
    Where a sigmoid or tanh is flat it passes on almost no gradient, and its output is the same for most inputs. BN
    keeps the input in the steep part at first. Training of weight and bias can move it out again. A gate that is open
    or closed is saturated on purpose, so the finding is a note.

    ## Evidence
    The check uses the graph of one forward pass on an example, and weight and bias. It assumes a normal output of BN
    with mean `bias` and standard deviation abs(`weight`). The flat part then holds 1 - (erf((t - b)/(|w| sqrt 2)) +
    erf((t + b)/(|w| sqrt 2)))/2. The check leaves out pruned channels, whose output is a constant because all weights
    that compute them are 0. It does not report a layer without a sigmoid or tanh behind it.

    ## Threshold
    The check reports a layer with more than `mass` of the values beyond `sigmoid` or `tanh` in at least a share
    `channels` of the channels.

    ## Remedy
    `manual`: use a lower learning rate or weight decay for weight and bias, or another activation.

    ## Sources
    Ioffe and Szegedy 2015 (arXiv 1502.03167), sections 1 and 4.2.2 (an Inception network with sigmoids trains with BN
    only); docs/background.md, "Saturated activations"; the experiment `activation-distributions` of the lab
    (docs/lab.md).
    """

    code, group, needs = "BN505", Group.NOTE, Needs.EXAMPLE
    remedies = ("manual",)
    why = "where the activation is flat, it passes on almost no gradient"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why the inputs of the activation are not known."""
        if layer.execution is None:
            return "not run on the example"
        return "weight and bias are not known" if layer.state is None and self._edge(layer) is not None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with a saturated activation behind it."""
        for layer in evidence.layers:
            edge = self._edge(layer)
            if edge is None or layer.state is None or layer.execution is None:
                continue
            flat = _flat_mass(layer.state, edge)
            saturated = flat > self.limits.mass
            if layer.execution.pruned is not None:
                saturated &= ~layer.execution.pruned.mask(layer.channels)
            if not saturated.any() or saturated.mean() < self.limits.channels:
                continue
            channels = tuple(np.flatnonzero(saturated).tolist())
            mass = float(np.median(flat[saturated]))
            yield self.finding(
                layer,
                f"{show(100 * mass)} % of the inputs of {layer.execution.activation} are beyond {show(edge)} "
                f"{in_channels(channels, layer)}, must be <= {show(100 * self.limits.mass)} %",
                channels=channels,
                measured={
                    "flat": Quantity(mass, "fraction"),
                    "channels": Quantity(float(saturated.mean()), "fraction"),
                },
                threshold={
                    "flat": Quantity(self.limits.mass, "fraction"),
                    "channels": Quantity(self.limits.channels, "fraction"),
                },
            )

    def _edge(self, layer: ModelLayer) -> float | None:
        """Return where the activation behind a layer begins to be flat; None if there is no sigmoid or tanh."""
        activation = None if layer.execution is None else layer.execution.activation
        return {"sigmoid": self.limits.sigmoid, "tanh": self.limits.tanh}.get(activation or "")

    CLEAN = (
        Case("relu", model),
        Case("sigmoid", lambda: _behind("sigmoid")),
        Case("weight 5 in front of a sigmoid", lambda: _behind("sigmoid", weight=(5, 5, 5, 5))),
        Case("weight 8 in front of a relu", lambda: _behind("relu", weight=(8, 8, 8, 8))),
        Case("no affine", lambda: _behind("tanh", weight=None, bias=None)),
        Case("no statistics", lambda: model(model_layer(state=None, execution=executed(activation="tanh")))),
        Case("not run", lambda: model(model_layer(execution=None))),
        Case("pruned", lambda: _behind("tanh", pruned=Pruned((3,), ("fc",)), bias=(0, 0, 0, 6))),
    )
    BROKEN = (
        Case(
            "bias 6 in front of a sigmoid",
            lambda: _behind("sigmoid", weight=(1, 1, 1, 0), bias=(6, 0, 0, 0)),
            layers=("bn",),
            channels=(0,),
            measured={"flat": 1 - (math.erf(-2 / math.sqrt(2)) + math.erf(10 / math.sqrt(2))) / 2},
        ),
        Case("constants of 3 in front of a tanh", lambda: _behind("tanh", weight=(0,) * 4, bias=(3,) * 4), ("bn",)),
    )


def _flat_mass(state: LayerState, edge: float) -> Floats:
    """Return the part of each channel's normal distribution outside [-edge, edge]."""
    ones = np.ones(state.channels)
    std = np.abs(ones if state.weight is None else state.weight) * math.sqrt(2)
    bias = 0 * ones if state.bias is None else state.bias
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inside = [
            math.erf(upper) + math.erf(lower)
            for upper, lower in zip((edge - bias) / std, (edge + bias) / std, strict=True)
        ]
    return 1 - np.array(inside) / 2


def _behind(activation: str, pruned: Pruned | None = None, **state: object) -> ModelEvidence:
    execution = executed(activation=activation, pruned=pruned)
    return model(model_layer(state=healthy(**state), execution=execution))  # type: ignore[arg-type]
