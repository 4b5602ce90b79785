"""BN403: batches that differ from each other more than sampling allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.groups import number_of_groups
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["HeterogeneousBatches"]

_SHUFFLED = observed(batches=12, images=384)


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
    before and after. The ratio is 1 for a shuffled loader. The check counts the groups where they are distinct.

    ## Why it matters
    A loader that is sorted or grouped (by class, video, patient, length) gives batch statistics that identify the
    group. In training they leak the group, and the running statistics fit no batch. In evaluation they are unreliable:
    a class-sorted loader gave ResNet-20 on CIFAR-10 (docs/background.md) an accuracy of 0.166 instead of 0.788.

    ## Evidence
    The check compares the batch means of `data`, and of `train_data` if there is any, with those of up to 12 batches
    with redistributed samples. The variance of single samples would be a wrong reference: a BN layer subtracts the mean
    of its batch, and with it most of the variation of the batch means behind it. The number of groups is the number of
    k-means clusters with the largest silhouette, in the layer where it is largest. It is stated above 0.7,
    unless another number fits almost as well, for 10 batches or more, and for 2 to 11 groups of 3 batches or more.

    ## Threshold
    The ratio is the median over the channels, in the layer where it is largest. It must exceed the variation of so few
    batches.

    ## Remedy
    `manual`: shuffle, with one sample per group in a batch. Where groups such as domains must stay apart, give each one
    its own BN layers. Use `GhostBatchNorm` or `BatchRenorm` where neither is possible.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 6 (leakage, figure 8); Ioffe 2017 (arXiv 1702.03275) on batches that
    are not drawn at random; Chang et al. 2019 (arXiv 1906.03950) on one BN layer per domain; Rousseeuw 1987 and Kaufman
    and Rousseeuw 1990 on silhouettes; docs/background.md, "Grouped batches".
    """

    code, group, needs = "BN403", Group.SUSPICIOUS, Needs.DATA
    remedies = ("manual",)
    why = (
        "batch statistics identify the group of the batch, and running statistics fit no group: shuffle, or give each "
        "group its own BN layers"
    )
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why neither the batches of `data` nor those of `train_data` can be compared."""
        evaluation, training = self._compared(layer, "evaluation"), self._compared(layer, "training")
        return evaluation if isinstance(evaluation, str) and isinstance(training, str) else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for each data set, at the layer with the largest ratio."""
        for kind in ("evaluation", "training"):
            compared = {layer: self._compared(layer, kind) for layer in evidence.layers}
            pairs = {layer: pair for layer, pair in compared.items() if not isinstance(pair, str)}
            excess = {layer: _ratio(*pair) / self._by_chance(*pair) for layer, pair in pairs.items()}
            beyond = sorted((layer for layer in excess if excess[layer] > 1), key=lambda each: -excess[each])
            if not beyond:
                continue
            layer = beyond[0]
            ratio, allowed = _ratio(*pairs[layer]), self._by_chance(*pairs[layer])
            groups = number_of_groups(pairs[each][0].batch_rows for each in beyond)
            known = {} if groups is None else {"groups": Quantity(groups, "groups")}
            form = "differ by groups or order" if groups is None else f"form {groups} groups"
            yield self.finding(
                layer,
                f"the means of the {kind} batches vary {show(ratio)} times as much as those of shuffled samples, must "
                f"be <= {show(allowed)}: the batches {form}",
                measured={"ratio": Quantity(ratio, "ratio"), **known},
                threshold={"ratio": Quantity(allowed, "ratio")},
            )

    def _compared(self, layer: ModelLayer, kind: str) -> tuple[Observed, Observed] | str:
        """Return the input of a layer over the batches and over shuffled ones, or why they cannot be compared."""
        evaluation, training = (layer.data, layer.shuffled), (layer.train_data, layer.train_shuffled)
        seen, shuffled = evaluation if kind == "evaluation" else training
        if seen is None:
            return "not run"
        if layer.execution is not None and layer.execution.calls > 1:
            return "it runs more than once"
        if shuffled is None:
            return "its batches cannot be shuffled"
        if seen.count < self.limits.values * seen.batches:
            return f"fewer than {self.limits.values:g} values per channel in a batch"
        few = min(seen.batches, shuffled.batches) < self.limits.batches
        return f"fewer than {self.limits.batches:g} batches" if few else (seen, shuffled)

    def _by_chance(self, seen: Observed, shuffled: Observed) -> float:
        """Return the largest ratio that is allowed for this number of batches."""
        error = math.sqrt(2 / max(seen.batches - 1, 1) + 2 / max(shuffled.batches - 1, 1))
        return max(self.limits.ratio, math.exp(self.limits.errors * error))

    CLEAN = (
        Case("shuffled", lambda: model(model_layer(shuffled=observed(batches=12)))),
        Case("three batches", lambda: model(model_layer(data=observed(between=20, batches=3, images=96)))),
        Case("twice as much by chance", lambda: model(model_layer(data=observed(between=2), shuffled=_SHUFFLED))),
    )
    BROKEN = (
        Case(
            "sorted by class",
            lambda: model(model_layer(data=observed(between=20), shuffled=_SHUFFLED)),
            layers=("bn",),
            measured={"ratio": 20.0},
        ),
        Case(
            "three domains in turn",
            lambda: model(model_layer(train_data=_in_turn(3), train_shuffled=_SHUFFLED)),
            layers=("bn",),
            measured={"ratio": 50.0, "groups": 3},
        ),
    )


def _in_turn(groups: int) -> Observed:
    noise = np.random.default_rng(0).normal(0, 0.05, (24, 8))
    return observed(between=50, batches=24, images=768, batch_rows=np.arange(24)[:, None] % groups + noise)


def _ratio(seen: Observed, shuffled: Observed) -> float:
    """Return the median over channels of the variance of batch means over that after shuffling."""
    usable = shuffled.batch_mean_var > 1e-12 * (seen.var + 1e-30)
    ratios = seen.batch_mean_var[usable] / shuffled.batch_mean_var[usable]
    return float(np.median(ratios)) if usable.any() else 0.0
