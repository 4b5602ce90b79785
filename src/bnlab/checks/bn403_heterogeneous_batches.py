"""BN403: batches that differ from each other more than sampling allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.groups import number_of_groups
from bnlab.observe.model_evidence import BetweenBatches, ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["HeterogeneousBatches"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN403."""

    ratio: float = limit(2.0, unit="ratio of variances", source="below, the batches vary little more than by chance")
    z: float = limit(5.0, unit="standard deviations", source="a normal value exceeds them once in 3 million cases")
    batches: float = limit(5, unit="batches", source="fewer batches do not determine a variance")
    samples: float = limit(3, unit="samples in a batch", source="the ratio cannot exceed the size of a batch")


class HeterogeneousBatches(ModelCheck[Limits]):
    """Batches that differ from each other more than randomly drawn samples would.

    ## What it does
    The check compares the variance of the batch means with that after the samples are shuffled among the batches. The
    ratio is 1 for a shuffled loader. The check counts the groups where they are distinct.

    ## Why it matters
    A loader that is sorted or grouped (by class, video, patient, length) gives batch statistics that identify the
    group. In training they leak the group, and the running statistics fit no batch. In evaluation they are unreliable:
    a class-sorted loader gave ResNet-20 on CIFAR-10 (docs/background.md) an accuracy of 0.166 instead of 0.788.

    ## Evidence
    The check takes the channel means of up to 32 samples in each of up to 32 batches of `data`, and of `train_data` if
    there is any. Every BN layer uses the statistics of the whole data set in this pass, so that no sample depends on
    its batch. Shuffling moves whole samples, so channels that follow one quantity count as one. The mean and variance
    over all orders of the samples have a closed form. The ratio is that of whole batches. The number of groups is the
    number of k-means clusters of batch statistics with the largest silhouette, in the layer where it is largest. It is
    stated above 0.7, unless another number fits almost as well, for 10 batches or more, and for 2 to 11 groups of 3
    batches or more.

    ## Threshold
    Both the ratio and z must exceed their limits in one layer. z is the normal deviate that is as improbable as the
    ratio. On 8 architectures and 4 seeds that no limit was chosen on, sorted batches, batches of two classes and
    half-sorted ones were reported in 64 of 64 cases each. Shuffled data were reported in 0 of 752, on seeds of their
    own.

    ## Remedy
    `manual`: shuffle, with one sample per group in a batch. Where groups such as domains must stay apart, give each one
    its own BN layers. Use `GhostBatchNorm` or `BatchRenorm` where neither is possible.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 6 (leakage, figure 8); Ioffe 2017 (arXiv 1702.03275) on batches that
    are not drawn at random; Chang et al. 2019 (arXiv 1906.03950) on one BN layer per domain; Kazi-Aoual et al. 1995
    (Computational Statistics and Data Analysis 20) on permutations; Wilson and Hilferty 1931 on z; Rousseeuw 1987 and
    Kaufman and Rousseeuw 1990 on silhouettes; docs/background.md, "Grouped batches".
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
        ratio, z = (Quantity(self.limits.ratio, "ratio"), Quantity(self.limits.z, "standard deviations"))
        for kind in ("evaluation", "training"):
            compared = ((layer, self._compared(layer, kind)) for layer in evidence.layers)
            usable = [(layer, *pair) for layer, pair in compared if not isinstance(pair, str)]
            beyond = [each for each in usable if each[2].ratio > ratio.value and each[2].z > z.value]
            if not beyond:
                continue
            layer, _, between = max(beyond, key=lambda each: each[2].ratio)
            by_spread = sorted((seen for _, seen, _ in beyond), key=_spread, reverse=True)
            groups = number_of_groups(seen.batch_rows for seen in by_spread)
            known = {} if groups is None else {"groups": Quantity(groups, "groups")}
            form = "differ by groups or order" if groups is None else f"form {groups} groups"
            measured = {"ratio": Quantity(between.ratio, ratio.unit), "z": Quantity(between.z, z.unit), **known}
            yield self.finding(
                layer,
                f"the means of the {kind} batches vary {show(between.ratio)} times as much as those of shuffled "
                f"samples, must be <= {show(ratio.value)}: the batches {form}",
                measured=measured,
                threshold={"ratio": ratio, "z": z},
            )

    def _compared(self, layer: ModelLayer, kind: str) -> tuple[Observed, BetweenBatches] | str:
        """Return the input of a layer and how much its batches differ, or why that is not known."""
        evaluation, training = (layer.data, layer.between), (layer.train_data, layer.train_between)
        seen, between = evaluation if kind == "evaluation" else training
        if seen is None:
            return "not run"
        if between is None:
            return "its batches cannot be shuffled"
        if between.samples < self.limits.samples:
            return f"fewer than {self.limits.samples:g} samples in a batch"
        few = between.batches < self.limits.batches
        return f"fewer than {self.limits.batches:g} batches" if few else (seen, between)

    CLEAN = (
        Case("shuffled", lambda: model(model_layer(between=_between(1.1, 0.4)))),
        Case("four batches", lambda: model(model_layer(between=_between(20, 9, batches=4)))),
        Case("three times as much by chance", lambda: model(model_layer(between=_between(3, 2.5, batches=6)))),
        Case("many large batches that hardly differ", lambda: model(model_layer(between=_between(1.6, 8)))),
    )
    BROKEN = (
        Case(
            "sorted by class",
            lambda: model(model_layer(between=_between(20, 30))),
            layers=("bn",),
            measured={"ratio": 20.0, "z": 30.0},
        ),
        Case(
            "three domains in turn",
            lambda: model(model_layer(train_data=_in_turn(3), train_between=_between(50, 40))),
            layers=("bn",),
            measured={"ratio": 50.0, "groups": 3},
        ),
    )


def _spread(seen: Observed) -> float:
    """Return how far the batch means are apart with batch statistics, with which the groups are counted."""
    return float(np.median(seen.batch_mean_var / (seen.var + 1e-30)))


def _between(ratio: float, z: float, *, batches: int = 20) -> BetweenBatches:
    return BetweenBatches(batches=batches, samples=32, ratio=ratio, z=z)


def _in_turn(groups: int) -> Observed:
    noise = np.random.default_rng(0).normal(0, 0.05, (24, 8))
    return observed(between=50, batches=24, images=768, batch_rows=np.arange(24)[:, None] % groups + noise)
