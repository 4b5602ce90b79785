"""BN401: running statistics that are not those of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import healthy, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.checks.effects import Effect, Estimate, effect_of
from bnlab.observe.evidence import LayerState
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["StaleStatistics"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN401."""

    effect: float = limit(
        0.35, unit="std", source="ResNet-20 on its training images without their augmentation: up to 0.33"
    )
    errors: float = limit(4.0, unit="standard errors", source="a channel in 16,000 by chance")
    channels: float = limit(0.1, unit="fraction", source="a few weak channels are off in healthy networks")


class StaleStatistics(ModelCheck[Limits]):
    """Running statistics that differ from those of the training data.

    ## What it does
    Compares running mean and variance with the mean over batches of the training data (of `data`, where that is all
    there is), by the size of the difference and by its standard error.

    ## Why it matters
    Eval mode normalises with statistics the network never saw in training: those of other weights (averaged, edited,
    fine-tuned), of other data, of too few updates, or of a copy that was not updated.

    ## Evidence
    Batches run with every upstream layer on batch statistics and dropout off, so that a layer answers for itself and
    not for those before it. Standard errors come from the means of single samples, for positions of one sample are not
    independent, plus the noise of the buffer itself: SE^2 + Var(mu_B) a/(2-a).

    ## Threshold
    abs(difference of means)/std, or abs(log of the ratio of variances)/2, above `effect` and above `errors` standard
    errors, in at least a share `channels` of the channels. Without the buffer's own noise 8 to 39 % of the channels of
    a healthy layer would be found at batch sizes 8 to 2.

    ## Remedy
    `recalibrate`. Of averaged weights (EMA, SWA, soups) the statistics are never right before that, and averaging the
    statistics of the single models does not make them so.

    ## Sources
    Wu and Johnson 2021, section 3; F1 to F4, F23 and F24 of the failure modes.
    """

    code, group, needs = "BN401", Group.SUSPICIOUS, Needs.DATA
    remedies = ("recalibrate",)
    why = "eval mode normalises with statistics that the training data does not have"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return why there is nothing to compare."""
        if layer.frozen:
            return "frozen on purpose"
        return "no running statistics, or not run" if layer.state is None or layer.data is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer whose statistics are stale."""
        for layer in evidence.layers:
            seen = layer.train_data or layer.data
            if layer.state is None or seen is None:
                continue
            effect = _staleness(layer.state, layer.momentum, layer.eps, seen)
            stale = effect.beyond(self.limits.effect, self.limits.errors)
            if stale.mean() < self.limits.channels:
                continue
            channels = tuple(np.flatnonzero(stale).tolist())
            data = "data" if layer.train_data is None else "training data"
            worst = float(effect.size[stale].max())
            yield self.finding(
                layer,
                f"running statistics are up to {show(worst)} standard deviations from those of the {data} "
                f"{in_channels(channels, layer)}, must be <= {show(self.limits.effect)}{_of_average(layer)}",
                channels=channels,
                measured={"effect": Quantity(worst, "std"), "channels": Quantity(float(stale.mean()), "fraction")},
                threshold={
                    "effect": Quantity(self.limits.effect, "std"),
                    "channels": Quantity(self.limits.channels, "fraction"),
                },
            )

    CLEAN = (
        Case("healthy", model),
        Case("0.3 std off", lambda: model(model_layer(state=healthy(running_mean=(0.5, -0.3, 0.2, 1.5))))),
        Case(
            "off within the noise of 8 images",
            lambda: model(
                model_layer(
                    state=healthy(running_mean=(0.8, -0.2, 0.4, 1.75)),
                    train_data=observed(images=8, batches=4, between=4),
                )
            ),
        ),
    )
    BROKEN = (
        Case(
            "statistics of other weights",
            lambda: model(model_layer("a"), model_layer("b", state=healthy("b", running_var=(8, 20, 4, 11)))),
            layers=("b",),
            channels=(0, 1, 2, 3),
        ),
        Case(
            "one channel of four",
            lambda: model(model_layer(state=healthy(running_mean=(0.3, -0.7, 5.1, 1.2)))),
            layers=("bn",),
            channels=(2,),
        ),
        Case("an average", lambda: model(model_layer(state=healthy(running_var=(9,) * 4), averaged=2)), layers=("bn",)),
    )


def _of_average(layer: ModelLayer) -> str:
    """Name the reason where the model itself says it."""
    return "" if layer.averaged is None else f": its weights are an average of {layer.averaged} models"


def _staleness(state: LayerState, momentum: float | None, eps: float, seen: Observed) -> Effect:
    """Return how far the buffers are from what the data says they should hold, with the noise a settled buffer has."""
    stored = np.where(np.isfinite(state.running_var), np.maximum(state.running_var, 0), np.inf)
    exact = np.zeros(state.channels)
    running = Estimate(state.running_mean, stored, exact, exact)
    return effect_of(running, Estimate(seen.within_mean, seen.within_var, *seen.buffer_noise(momentum)), eps)
