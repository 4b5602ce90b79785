"""BN403: batches that differ from each other more than sampling allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["HeterogeneousBatches"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN403."""

    ratio: float = limit(4.0, unit="ratio of variances", source="shuffled loaders of real data reach 2 at 20 batches")
    errors: float = limit(2.5, unit="standard errors of the log ratio", source="the median over channels varies less")
    values: float = limit(8, unit="values", source="smaller batches leave almost no variance behind another BN layer")
    batches: float = limit(5, unit="batches", source="fewer batches do not determine a variance")


class HeterogeneousBatches(ModelCheck[Limits]):
    """Batches that differ from each other more than randomly drawn samples would.

    ## What it does
    The check redistributes the samples of the data to batches at random and compares the variance of the batch means
    before and after. The ratio is 1 for a shuffled loader.

    ## Why it matters
    A loader that is sorted or grouped (by class, video, patient, length) gives batch statistics that identify the
    group. In training they leak the group, and the running statistics fit no batch. In evaluation every number from
    batch statistics is unreliable: a class-sorted loader gave ResNet-20 on CIFAR-10 (docs/background.md) an accuracy of
    0.166 instead of 0.788.

    ## Evidence
    The check compares the batch means of `data`, and of `train_data` if there is any, with those of up to 12 batches
    with redistributed samples. The variance of single samples would be a wrong reference: a BN layer subtracts the mean
    of its batch, and with it most of the variation of the batch means behind it.

    ## Threshold
    The ratio is the median over the channels, in the layer where it is largest. It must exceed the variation of so few
    batches.

    ## Remedy
    `manual`: shuffle, with one sample per group in a batch. Use `GhostBatchNorm` or `BatchRenorm` where this is
    impossible.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 6 (leakage, figure 8); Ioffe 2017 (arXiv 1702.03275) on batches that
    are not drawn at random; docs/background.md, "Grouped batches".
    """

    code, group, needs = "BN403", Group.SUSPICIOUS, Needs.DATA
    remedies = ("manual",)
    why = "batch statistics identify the group of the batch, and no cause can be concluded from them"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why the batches cannot be compared."""
        if layer.data is None:
            return "not run"
        if layer.shuffled is None:
            return "its batches cannot be shuffled"
        if layer.execution is not None and layer.execution.calls > 1:
            return "it runs more than once"
        if layer.data.count < self.limits.values * layer.data.batches:
            return f"fewer than {self.limits.values:g} values per channel in a batch"
        return f"fewer than {self.limits.batches:g} batches" if layer.data.batches < self.limits.batches else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for each data set, at the layer with the largest ratio."""
        for name in ("data", "train_data"):
            ratios = {
                layer: _ratio(seen, shuffled) / self._by_chance(seen, shuffled)
                for layer in evidence.layers
                if (seen := getattr(layer, name)) is not None
                and (shuffled := _shuffled(layer, name)) is not None
                and min(seen.batches, shuffled.batches) >= self.limits.batches
            }
            if ratios and max(ratios.values()) > 1:
                layer = max(ratios, key=lambda layer: ratios[layer])
                allowed = self._by_chance(getattr(layer, name), _shuffled(layer, name))
                ratio = ratios[layer] * allowed
                yield self.finding(
                    layer,
                    f"batch means of {name} vary {show(ratio)} times as much as those of shuffled samples, "
                    f"must be <= {show(allowed)}",
                    measured={"ratio": Quantity(ratio, "ratio")},
                    threshold={"ratio": Quantity(allowed, "ratio")},
                )

    def _by_chance(self, seen: Observed, shuffled: Observed | None) -> float:
        """Return the largest ratio that is allowed for this number of batches."""
        after = seen.batches if shuffled is None else shuffled.batches
        error = math.sqrt(2 / max(seen.batches - 1, 1) + 2 / max(after - 1, 1))
        return max(self.limits.ratio, math.exp(self.limits.errors * error))

    CLEAN = (
        Case("shuffled", lambda: model(model_layer(shuffled=observed(batches=12)))),
        Case("three batches", lambda: model(model_layer(data=observed(between=20, batches=3, images=96)))),
        Case(
            "twice as much by chance",
            lambda: model(model_layer(data=observed(between=2), shuffled=observed(batches=12, images=384))),
        ),
    )
    BROKEN = (
        Case(
            "sorted by class",
            lambda: model(model_layer(data=observed(between=20), shuffled=observed(batches=12, images=384))),
            layers=("bn",),
            measured={"ratio": 20.0},
        ),
    )


def _shuffled(layer: ModelLayer, name: str) -> Observed | None:
    return layer.shuffled if name == "data" else layer.train_shuffled


def _ratio(seen: Observed, shuffled: Observed) -> float:
    """Return the median over channels of the variance of batch means over that after shuffling."""
    usable = shuffled.batch_mean_var > 1e-12 * (seen.var + 1e-30)
    ratios = seen.batch_mean_var[usable] / shuffled.batch_mean_var[usable]
    return float(np.median(ratios)) if usable.any() else 0.0
