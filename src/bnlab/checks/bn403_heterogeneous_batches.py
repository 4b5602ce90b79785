"""BN403: batches that differ from each other more than sampling allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks._cases import model, model_layer, observed
from bnlab.checks._check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["HeterogeneousBatches"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN403."""

    ratio: float = limit(
        3.0, unit="ratio of variances", source="shuffled loaders of real data: up to 1.5 at 20 batches"
    )
    batches: float = limit(5, unit="batches", source="fewer do not give a variance")


class HeterogeneousBatches(ModelCheck[Limits]):
    """Batches that differ from each other more than samples drawn at random would.

    ## What it does
    Compares the variance of the batch means with what the variance of the means of single samples predicts for batches
    drawn at random: the ratio is 1 for a shuffled loader.

    ## Why it matters
    A loader that is sorted or grouped (by class, video, patient, length) gives batch statistics that carry the group.
    In training they leak it, and the running statistics suit no batch. In evaluation every number from batch statistics
    is unreliable: a class-sorted loader gave 0.166 instead of 0.788.

    ## Evidence
    The means of batches and of single samples, of `data`, and of `train_data` if given.

    ## Threshold
    The median over the channels of a layer.

    ## Remedy
    `manual`: shuffle, with one sample per group in a batch; `GhostBatchNorm` or `BatchRenorm` where that is impossible.

    ## Sources
    Wu and Johnson 2021, section 6 (leakage, figure 8); Ioffe 2017 on batches that are not drawn at random; F7.
    """

    code, group, needs = "BN403", Group.SUSPICIOUS, Needs.DATA
    remedies = ("manual",)
    why = "batch statistics carry the group a batch was made of, and no cause can be concluded from them"
    limits = Limits()

    def lacks(self, layer: ModelLayer, limits: Limits) -> str | None:
        """Return why the batches cannot be compared."""
        if layer.data is None:
            return "not run"
        return f"fewer than {limits.batches:g} batches" if layer.data.batches < limits.batches else None

    def inspect(self, evidence: ModelEvidence, limits: Limits) -> Iterator[Finding]:
        """Yield one finding for each data set, at the layer where it shows most."""
        for name in ("data", "train_data"):
            ratios = {
                layer: _ratio(seen)
                for layer in evidence.layers
                if (seen := getattr(layer, name)) is not None and seen.batches >= limits.batches
            }
            found = {layer: value for layer, value in ratios.items() if value > limits.ratio}
            if len(found) * 2 > len(ratios):
                layer = max(found, key=lambda layer: found[layer])
                yield self.finding(
                    layer,
                    f"batch means of {name} vary {show(found[layer])} times as much as those of shuffled samples "
                    f"would, must be <= {show(limits.ratio)}",
                    measured={"ratio": Quantity(found[layer], "ratio"), "layers": Quantity(len(found), "layers")},
                    threshold={"ratio": Quantity(limits.ratio, "ratio")},
                )

    CLEAN = (
        Case("shuffled", model),
        Case("three batches", lambda: model(model_layer(data=observed(between=20, batches=3, images=96)))),
    )
    BROKEN = (
        Case(
            "sorted by class",
            lambda: model(model_layer(data=observed(between=20))),
            layers=("bn",),
            measured={"ratio": 20.0},
        ),
    )


def _ratio(seen: Observed) -> float:
    expected: Floats = seen.image_mean_var / max(seen.images_per_batch, 1.0)
    usable = expected > 1e-12 * (seen.var + 1e-30)
    return float(np.median(seen.batch_mean_var[usable] / expected[usable])) if usable.any() else 1.0
