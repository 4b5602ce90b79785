"""BN401: running statistics that are not those of the training data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from bnlab.checks.cases import healthy, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.checks.effects import STALE_CHANNELS, STALE_EFFECT, STALE_ERRORS, STALE_SCALE, stale_of, why_skipped
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.observe.upstream import upstream_of
from bnlab.observe.way_to_data import way_to_data
from bnlab.records import Finding, Quantity

__all__ = ["StaleStatistics"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN401."""

    effect: float = limit(
        STALE_EFFECT, unit="std", source="ResNet-20 on its training images without their augmentation: up to 0.33"
    )
    errors: float = limit(STALE_ERRORS, unit="standard errors", source="by chance 1 channel in 16,000 exceeds it")
    channels: float = limit(STALE_CHANNELS, unit="fraction", source="a few weak channels are off in healthy networks")
    scale: float = limit(
        STALE_SCALE,
        unit="log of std",
        source="up to 0.14 in healthy networks; 0.12 in that ResNet-20; 0.35 for a factor 2",
    )


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
    reports a layer if a share `channels` of its channels is beyond `effect` and `errors` standard errors. Without the
    noise of the buffer, that would be 8 % of the channels of a healthy layer at batch size 8, and 39 % at size 2. The
    check also reports a layer if half the log of the ratio of variances is beyond `scale` in the median channel, and
    beyond `errors`. It is 0.35 for a factor 2: `effect` alone reports 132 of 204 such layers, and both report all.

    ## Remedy
    `recalibrate`, unless the loss on the training data shows that the weights were trained with the stored statistics
    (docs/recalibrate.md). Averaged weights (EMA, SWA, soups) always need it, also where statistics were averaged.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 3; docs/background.md, "Stale statistics" and "What the running
    statistics average".
    """

    code, group, needs = "BN401", Group.SUSPICIOUS, Needs.DATA
    remedies = ("recalibrate",)
    why = "eval mode normalises with statistics that the training data does not have"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to compare."""
        unknown = "no running statistics, or not run" if layer.state is None or layer.data is None else None
        return why_skipped(layer) or unknown

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer whose statistics are stale."""
        limits = asdict(self.limits)
        stale = {layer: why for layer in evidence.layers if (why := stale_of(layer, **limits)) is not None}
        way = way_to_data(stale)
        for layer, why in stale.items():
            data, share = "data" if layer.train_data is None else "training data", len(why.channels) / layer.channels
            measured = {"effect": Quantity(why.effect, "std"), "channels": Quantity(share, "fraction")}
            threshold = {key: Quantity(limits[key], one.unit) for key, one in measured.items()}
            text = (
                f"running statistics are up to {show(why.effect)} standard deviations from those of the {data} "
                f"{in_channels(why.channels, layer)}, must be <= {show(self.limits.effect)}"
            )
            if why.ratio is not None:
                bound = math.exp(math.copysign(2 * self.limits.scale, why.ratio - 1))
                measured["variance ratio"] = Quantity(why.ratio, "running_var / variance")
                threshold = {"variance ratio": Quantity(bound, "running_var / variance")}
                text = (
                    f"running_var is {show(why.ratio)} times the variance of the {data} in the median channel, "
                    f"must be {'<' if bound > 1 else '>'}= {show(bound)} times"
                )
            text += _reason(layer, way)
            yield self.finding(layer, text, channels=why.channels, measured=measured, threshold=threshold)

    CLEAN = (
        Case("healthy", model),
        Case("0.3 std off", lambda: _stored((0.5, -0.3, 0.2, 1.5))),
        Case("1.5 times the variance", lambda: _scaled(1.5)),
        Case(
            "off within the noise of 8 images",
            lambda: _stored((0.8, -0.2, 0.4, 1.75), train_data=observed(images=8, batches=4, between=4)),
        ),
    )
    BROKEN = (
        Case(
            "statistics of other weights",
            lambda: model(model_layer("a"), model_layer("b", state=healthy("b", running_var=(8, 20, 4, 11)))),
            layers=("b",),
            channels=(0, 1, 2, 3),
        ),
        Case("one channel of four", lambda: _stored((0.3, -0.7, 5.1, 1.2)), layers=("bn",), channels=(2,)),
        Case("twice the variance", lambda: _scaled(2.0), ("bn",), (0, 1, 2, 3), {"variance ratio": 2.0}),
        Case(
            "statistics of the evaluation data",
            lambda: _stored((1.28, 0.28, 1.08, 2.18), data=observed(mean=(1.3, 0.3, 1.1, 2.2))),
            layers=("bn",),
        ),
        Case("an average", lambda: model(model_layer(state=healthy(running_var=(9,) * 4), averaged=2)), layers=("bn",)),
    )


def _stored(running_mean: Sequence[float], **changes: object) -> ModelEvidence:
    return model(model_layer("bn", state=healthy(running_mean=running_mean), **changes))


def _scaled(ratio: float) -> ModelEvidence:
    return model(model_layer(eps=0.0, state=healthy(running_var=(0.8 * ratio, 2 * ratio, 0.4 * ratio, 1.1 * ratio))))


def _reason(layer: ModelLayer, way: float | None) -> str:
    average = "" if layer.averaged is None else f": its weights are an average of {layer.averaged} models"
    if way is None:
        upstream = upstream_of(layer)
        return average if upstream is None else f"{average}; the reason is {upstream.phrase}"
    return (
        f"{average}; they are {100 * way:.0f} % of the way to those of `data`: it ran in train mode, the model was "
        "adapted to it, or data and train_data are exchanged"
    )
