"""BN404: padding that is counted in the statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.checks.effects import Estimate, effect_of
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Padding, PaddingEffect
from bnlab.records import Finding, Level, Quantity

__all__ = ["PaddedStatistics"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN404."""

    effect: float = limit(0.1, unit="std", source="a smaller shift of the normalised inputs hardly changes an output")
    channels: float = limit(0.1, unit="fraction", source="as for BN401")


class PaddedStatistics(ModelCheck[Limits]):
    """Padded positions of the training inputs that are counted in the batch statistics.

    ## What it does
    The check looks at one end of the training inputs for exactly constant runs of different length. It measures each
    BN layer with and without these positions.

    ## Why it matters
    Padding pulls the mean of a channel towards one value and changes its variance, the more the longer the longest
    sample of a batch is. The running statistics are an average over these amounts. A sample that comes alone, without
    padding, is normalised with them. Recalibration on padded batches does not help.

    ## Evidence
    The check reads the input of the model in up to 8 batches of `train_data`, with shape (N, L), (N, C, L), (N, L, C)
    or (N, C, H, W). A tail is a constant run at the end or the beginning of a sample that is more than three times as
    long as each other constant run in it. It is a warning if a mask or lengths in the batch agree with the tails, or if
    batches have different lengths, the tails hold one value, and each batch has a sample without a tail. Otherwise it
    is a note, because silence and saturated curves look the same. Images of one size have no tails. The check is silent
    if the mask of the batch keeps the tails, and on a layer that gets a mask, packed sequences or pooled values.

    ## Threshold
    The effect is abs(difference of means)/std or abs(log of the ratio of variances)/2, whichever is larger. The check
    reports a layer if the effect is above `effect` in at least a share `channels` of the channels.

    ## Remedy
    `manual`: pass the mask to a layer of bnlab.nn, as in `BatchNorm1d(channels)(x, mask=keep)` (docs/layers.md,
    "Padding"), or put samples of one length into a batch. Then train again, or recalibrate.

    ## Sources
    Laurent et al. 2015 (arXiv 1510.01378), whose statistics over sequences count the frames that are no padding;
    PyTorch issue 70529 (https://github.com/pytorch/pytorch/issues/70529); deepspeech.pytorch issue 312
    (https://github.com/SeanNaren/deepspeech.pytorch/issues/312).
    """

    code, group, needs = "BN404", Group.SUSPICIOUS, Needs.TRAIN_DATA
    remedies = ("manual",)
    why = "statistics that count padding depend on its amount: `mask=` of the layers of bnlab.nn leaves it out"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why it is not known whether padding is counted, or why it does not matter."""
        if layer.train_data is None:
            return "not run on the training data"
        return "frozen" if layer.frozen else layer.padding_unknown

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer whose statistics padding changes."""
        for layer in evidence.layers:
            if evidence.padding is None or layer.padding is None:
                continue
            size = _effect(layer.padding, layer.eps)
            beyond = size > self.limits.effect
            if beyond.mean() < self.limits.channels:
                continue
            certain = evidence.padding.certain
            channels = tuple(np.flatnonzero(beyond).tolist())
            what = "padding" if certain else "constant ends of samples (padding, or really constant)"
            yield self.finding(
                layer,
                f"{100 * layer.padding.share:.0f} % of the positions are {what} and change the batch statistics "
                f"by up to {show(float(size.max()))} standard deviations {in_channels(channels, layer)}, must be <= "
                f"{show(self.limits.effect)}{f': {evidence.padding.proof}' if certain else ''}",
                channels=channels,
                measured={
                    "effect": Quantity(float(size.max()), "std"),
                    "channels": Quantity(float(beyond.mean()), "fraction"),
                    "padding": Quantity(layer.padding.share, "fraction"),
                },
                threshold={
                    "effect": Quantity(self.limits.effect, "std"),
                    "channels": Quantity(self.limits.channels, "fraction"),
                },
                level=None if certain else Level.INFO,
            )

    CLEAN = (
        Case("no padding", model),
        Case("an effect of 0.09 std", lambda: _padded(0.09)),
        Case("a masked layer", lambda: model(padding=_tails())),
        Case("positions that cannot be matched", lambda: _padded(0.5, padding_unknown="not matched")),
        Case("frozen", lambda: _padded(0.5, frozen=True)),
    )
    BROKEN = (
        Case(
            "an attention mask in the batch",
            lambda: _padded(0.5, share=0.4),
            layers=("bn",),
            channels=(0, 1, 2, 3),
            measured={"effect": 0.5, "channels": 1.0, "padding": 0.4},
        ),
    )


def _effect(padding: PaddingEffect, eps: float) -> Floats:
    """Return the larger of the effects on mean and variance, in standard deviations. Shape (C,)."""
    none = np.zeros_like(padding.mean)
    whole = Estimate(padding.mean, padding.var, none, none)
    return effect_of(whole, Estimate(padding.valid_mean, padding.valid_var, none, none), eps).size


def _tails(proof: str | None = "`attention_mask` shows where it is") -> Padding:
    return Padding(side="end", samples=64, padded_samples=50, share=0.4, lengths=(40, 60), proof=proof)


def _padded(effect: float, *, share: float = 0.4, **changes: object) -> ModelEvidence:
    """Return a layer whose mean padding shifts by so many standard deviations."""
    var = np.full(4, 4.0)
    shifted = PaddingEffect(share=share, mean=2 * effect * np.ones(4), var=var, valid_mean=np.zeros(4), valid_var=var)
    return model(model_layer("bn", **{"eps": 0.0, "padding": shifted, **changes}), padding=_tails())
