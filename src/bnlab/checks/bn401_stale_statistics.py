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
    errors: float = limit(4.0, unit="standard errors", source="by chance 1 channel in 16,000 exceeds it")
    channels: float = limit(0.1, unit="fraction", source="a few weak channels are off in healthy networks")


class StaleStatistics(ModelCheck[Limits]):
    """Running statistics that differ from those of the training data.

    ## What it does
    The check compares running mean and variance with the mean over batches of the training data, or of `data` if there
    is no `train_data`. It judges the size of the difference and its standard error.

    ## Why it matters
    Eval mode normalises with statistics that the network never had in training. They belong to other weights (averaged,
    edited, fine-tuned), to other data, to too few updates, or to a copy that was not updated.

    ## Evidence
    The batches run with every upstream layer on batch statistics and with dropout off, so that each layer shows its own
    error only. Standard errors come from the means of single samples, because the positions of one sample are not
    independent. The noise of the buffer itself is added: SE^2 + Var(mu_B) a/(2-a).

    ## Threshold
    The effect is abs(difference of means)/std or abs(log of the ratio of variances)/2, whichever is larger. The check
    reports a layer if the effect is above `effect` and above `errors` standard errors in at least a share `channels` of
    the channels. Without the noise of the buffer the check would report 8 % of the channels of a healthy layer at batch
    size 8 and 39 % at batch size 2.

    ## Remedy
    `recalibrate`. For averaged weights (EMA, SWA, soups) the statistics are never right before that. An average of the
    statistics of the single models is wrong too.

    ## Sources
    Wu and Johnson 2021, section 3; docs/background.md, "Stale statistics"; docs/background.md, "What the running
    statistics average".
    """

    code, group, needs = "BN401", Group.SUSPICIOUS, Needs.DATA
    remedies = ("recalibrate",)
    why = "eval mode normalises with statistics that the training data does not have"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to compare."""
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
    """Name the reason where the model itself is an average of models."""
    return "" if layer.averaged is None else f": its weights are an average of {layer.averaged} models"


def _staleness(state: LayerState, momentum: float | None, eps: float, seen: Observed) -> Effect:
    """Return how far the buffers are from the statistics of the data, with the noise of a settled buffer."""
    stored = np.where(np.isfinite(state.running_var), np.maximum(state.running_var, 0), np.inf)
    exact = np.zeros(state.channels)
    running = Estimate(state.running_mean, stored, exact, exact)
    return effect_of(running, Estimate(seen.within_mean, seen.within_var, *seen.buffer_noise(momentum)), eps)
