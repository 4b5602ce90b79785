"""BN402: evaluation data with other statistics than the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.checks.effects import Estimate, effect_of
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["DistributionShift"]


_TOO_FEW = "its batches have few values per channel and cannot be joined into batches of a common size"


@dataclass(frozen=True)
class Limits:
    """Limits of BN402."""

    effect: float = limit(
        0.25, unit="std", source="healthy networks: up to 0.04 at the 90th percentile of the channels"
    )
    errors: float = limit(4.0, unit="standard errors", source="by chance 1 channel in 16,000 exceeds it")
    channels: float = limit(0.1, unit="fraction", source="as for BN401")


class DistributionShift(ModelCheck[Limits]):
    """Evaluation data whose statistics differ from those of the training data.

    ## What it does
    The check compares the population statistics of every layer's input between `data` and `train_data`.

    ## Why it matters
    The running statistics are right for the training data and wrong for the evaluation data. Often the preprocessing
    differs: no normalization, another range or order of channels, another resize. Otherwise the data come from another
    domain.

    ## Evidence
    The batches of both data sets run with every layer on batch statistics and with dropout off. Where either data set
    has fewer than 16 values per channel in a batch, its samples are joined into batches of the size of the other ones,
    because the noise of small batches changes the statistics of the layers behind. The check skips data whose samples
    cannot be joined. The first reported layer is nearest to the reason.

    ## Threshold
    The effect is abs(difference of means)/std or abs(log of the ratio of variances)/2, whichever is larger. The check
    reports a layer if the effect is above `effect` and above `errors` standard errors in at least a share `channels` of
    the channels.

    ## Remedy
    `manual`: compare the preprocessing first. Recalibration on the evaluation data adapts the network to them, and
    needs many samples of all classes.

    ## Sources
    Schneider et al. 2020 (arXiv 2006.16971) and Li et al. 2016 (AdaBN, arXiv 1603.04779) on the adaptation of
    statistics; docs/background.md, "Data with other statistics".
    """

    code, group, needs = "BN402", Group.SUSPICIOUS, Needs.TRAIN_DATA
    remedies = ("manual",)
    why = "statistics that fit the training data do not fit the evaluation data"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to compare."""
        if layer.data is None or layer.train_data is None:
            return "not run"
        return None if layer.compared is not None else _TOO_FEW

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer that sees a shift."""
        for layer in evidence.layers:
            if layer.compared is None:
                continue
            data, train_data = map(_population, layer.compared)
            effect = effect_of(data, train_data, layer.eps)
            shifted = effect.beyond(self.limits.effect, self.limits.errors)
            if shifted.mean() < self.limits.channels:
                continue
            channels = tuple(np.flatnonzero(shifted).tolist())
            worst = float(effect.size[shifted].max())
            yield self.finding(
                layer,
                f"data is up to {show(worst)} standard deviations from the training data "
                f"{in_channels(channels, layer)}, must be <= {show(self.limits.effect)}",
                channels=channels,
                measured={"effect": Quantity(worst, "std"), "channels": Quantity(float(shifted.mean()), "fraction")},
                threshold={
                    "effect": Quantity(self.limits.effect, "std"),
                    "channels": Quantity(self.limits.channels, "fraction"),
                },
            )

    CLEAN = (
        Case("the same data", model),
        Case("0.2 std apart", lambda: model(model_layer(data=observed(mean=(0.4, -0.5, 0.2, 1.3))))),
        Case(
            "apart within the noise of 8 images",
            lambda: model(model_layer(data=observed(mean=(0.65, -0.2, 0.37, 1.64), images=8, batches=4))),
        ),
        Case(
            "apart by the noise of small batches alone",
            lambda: model(model_layer(data=observed(var=(80, 200, 40, 110)), common_data=observed())),
        ),
    )
    BROKEN = (
        Case(
            "pixels in [0, 255] instead of [0, 1]",
            lambda: model(model_layer(data=observed(var=(80, 200, 40, 110)))),
            layers=("bn",),
            channels=(0, 1, 2, 3),
        ),
    )


def _population(seen: Observed) -> Estimate:
    return Estimate(seen.mean, seen.var, seen.mean_error**2, seen.var_error**2)
