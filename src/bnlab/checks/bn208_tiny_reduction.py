"""BN208: too few values per channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import executed, healthy, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.checks.effects import is_stale
from bnlab.conventions import FEW_VALUES, FEW_VALUES_SOURCE
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity
from bnlab.wording import TRAINED_WITH

__all__ = ["TinyReduction"]


_PAIRS = observed(images=40, batches=20, positions=1)


@dataclass(frozen=True)
class Limits:
    """Limits of BN208."""

    count: float = limit(
        FEW_VALUES,
        unit="values per channel",
        source=FEW_VALUES_SOURCE,
    )


class TinyReduction(ModelCheck[Limits]):
    """Batch statistics of too few values per channel.

    ## What it does
    The check counts the values per channel, N*prod(spatial), that a layer in train mode normalises with.

    ## Why it matters
    Batch statistics of few values are noise. No output exceeds sqrt(m - 1) standard deviations, so with two values
    every output is -1 or 1. The gain 1/std is also too high on average. Eval mode has neither effect, so it computes a
    different function. The batch size alone does not show this: late 1x1 maps and layers behind a pooling have N values
    only.

    ## Evidence
    The count is the mean over the batches of `train_data`, or of `data` if there is no `train_data`. Without both it is
    that of the smallest call on the example. The finding also measures the smallest count, but a small last batch alone
    causes no finding. A layer in eval mode is judged by the batches of `train_data` alone, provided that its running
    statistics are those of such batches. The check skips a frozen layer, and one whose weights were trained with the
    stored statistics. It also skips SyncBatchNorm, which uses the values of all processes, and BatchRenorm, which is
    made for small batches.

    ## Threshold
    A layer needs 16 values. Wu and Johnson observe a loss of accuracy from batches of 8 images downwards.

    ## Remedy
    `manual`: use a larger batch, SyncBatchNorm, BatchRenorm or GroupNorm. For fine-tuning use `freeze`: with batches of
    two images it gave an error of 25.2 % instead of 32.5 %.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), figures 5 and 6; Ioffe 2017 (arXiv 1702.03275); rule TA304 of torch-audit
    (https://github.com/RMalkiv/torch-audit, RULES.md), which counts images only; docs/background.md, "Small counts".
    """

    code, group, needs = "BN208", Group.SUSPICIOUS, Needs.EXAMPLE
    remedies = ("freeze", "manual")
    why = "batch statistics of so few values are noise, and eval mode normalises without this noise"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why the counts of a layer do not matter or are not known."""
        if layer.frozen:
            return "frozen"
        if layer.trained_with:
            return TRAINED_WITH
        if not (layer.training or layer.state is None):
            if layer.train_data is None:
                return "in eval mode, and there is no train_data"
            if is_stale(layer):
                return "its statistics are not those of the batches of train_data"
        for kind in ("SyncBatchNorm", "BatchRenorm"):
            if kind in layer.kind:
                return f"{kind} normalises with more than the values of one batch in one process"
        return "not run on the example" if layer.execution is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with few values."""
        for layer in evidence.layers:
            typical, smallest, where = _counts(layer)
            if typical is None or typical >= self.limits.count:
                continue
            yield self.finding(
                layer,
                f"batch statistics are taken over {show(typical)} values per channel {where}, must be >= "
                f"{show(self.limits.count)}",
                measured={
                    "count": Quantity(typical, "values per channel"),
                    "smallest count": Quantity(smallest, "values per channel"),
                },
                threshold={"count": Quantity(self.limits.count, "values per channel")},
            )

    CLEAN = (
        Case("1568 values", model),
        Case("16 samples of one value", lambda: _few(counts=(16,))),
        Case("a ragged last batch", lambda: _few(counts=(2,), data=observed(images=642, batches=21, positions=1))),
        Case("in eval mode, without train_data", lambda: _few(training=False)),
        Case(
            "in eval mode, with other statistics than those of small batches",
            lambda: _few(
                training=False, data=_PAIRS, train_data=_PAIRS, state=healthy(running_mean=(2.3, 1.3, 2.1, 3.2))
            ),
        ),
        Case("trained with its statistics", lambda: _few(trained_with=True, train_data=_PAIRS)),
        Case("frozen", lambda: _few(frozen=True)),
        Case("other processes have more", lambda: _few(kind="SyncBatchNorm")),
        Case("not run", lambda: model(model_layer(execution=None))),
    )
    BROKEN = (
        Case("4 samples behind a pooling", lambda: _few(), layers=("bn",), measured={"count": 4}),
        Case(
            "batches of 2",
            lambda: _few(counts=(64,), data=_PAIRS),
            layers=("bn",),
            measured={"count": 2, "smallest count": 2},
        ),
        Case(
            "trained with batches of 2, in eval mode",
            lambda: _few(counts=(64,), training=False, data=observed(), train_data=_PAIRS),
            layers=("bn",),
        ),
        Case("no running statistics, in eval mode", lambda: _few(state=None, training=False), layers=("bn",)),
    )


def _counts(layer: ModelLayer) -> tuple[float | None, int, str]:
    """Return the typical and the smallest count, and whether they come from batches or from the example."""
    seen = layer.train_data or layer.data
    if seen is not None and seen.batches:
        return seen.count / seen.batches, seen.smallest_count, "in a batch"
    counts = () if layer.execution is None else layer.execution.counts
    return (min(counts), min(counts), "on the example") if counts else (None, 0, "")


def _few(*, counts: tuple[int, ...] = (4,), **changes: object) -> ModelEvidence:
    return model(
        model_layer("bn", **{"execution": executed(counts=counts), "data": None, "train_data": None, **changes})
    )
