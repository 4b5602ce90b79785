"""BN208: too few values per channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import executed, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["TinyReduction"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN208."""

    count: float = limit(
        16, unit="values per channel", source="a Gaussian batch of 16 is 9 % too loud, one of 8 20 %, one of 4 60 %"
    )


class TinyReduction(ModelCheck[Limits]):
    """Batch statistics of too few values per channel.

    ## What it does
    Counts the values per channel, N*prod(spatial), that a layer in train mode normalises with.

    ## Why it matters
    Batch statistics of few values are noise. No output can exceed sqrt(m - 1) standard deviations, so that with two
    values every output is -1 or 1; the gain 1/std is too high on average; eval mode, which has neither, sees another
    network. The batch size alone does not tell: late 1x1 maps and layers behind a pooling have N values only.

    ## Evidence
    The mean count of the batches of `train_data`, else of `data`; without them the smallest call on the example. A
    ragged last batch is reported, and does not fire on its own. A layer that uses no batch statistics (frozen, or in
    eval mode) is skipped, and so is one whose counts are not those of this process (SyncBatchNorm) or that is made for
    small batches (BatchRenorm).

    ## Threshold
    16 values; Wu and Johnson find a loss from batches of 8 images downwards.

    ## Remedy
    `manual`: a larger batch, SyncBatchNorm, BatchRenorm or GroupNorm. To fine-tune, `freeze`: with batches of
    two images it gave 25.2 instead of 32.5 % error.

    ## Sources
    Wu and Johnson 2021, figures 5 and 6; Ioffe 2017; torch-audit TA304 counts images only; F5 of the failure modes,
    formulas 5.4.
    """

    code, group, needs = "BN208", Group.SUSPICIOUS, Needs.EXAMPLE
    remedies = ("freeze", "manual")
    why = "batch statistics of so few values are noise, and eval mode normalises without it"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return why its counts do not matter or are not known."""
        if layer.frozen:
            return "frozen"
        if not (layer.training or layer.state is None):
            return "does not use batch statistics"
        for kind in ("SyncBatchNorm", "BatchRenorm"):
            if kind in layer.kind:
                return f"{kind}: the values of one batch and process are not all it uses"
        return "not run on the example" if layer.execution is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with few values."""
        for layer in evidence.layers:
            typical, smallest, where = _counts(layer)
            if typical is None or typical >= self.limits.count:
                continue
            yield self.finding(
                layer,
                f"batch statistics are over {show(typical)} values per channel {where}, must be >= "
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
        Case("in eval mode", lambda: _few(training=False)),
        Case("frozen", lambda: _few(frozen=True)),
        Case("other processes have more", lambda: _few(kind="SyncBatchNorm")),
        Case("not run", lambda: model(model_layer(execution=None))),
    )
    BROKEN = (
        Case("4 samples behind a pooling", lambda: _few(), layers=("bn",), measured={"count": 4}),
        Case(
            "batches of 2",
            lambda: _few(counts=(64,), data=observed(images=40, batches=20, positions=1)),
            layers=("bn",),
            measured={"count": 2, "smallest count": 2},
        ),
        Case("no running statistics, in eval mode", lambda: _few(state=None, training=False), layers=("bn",)),
    )


def _counts(layer: ModelLayer) -> tuple[float | None, int, str]:
    """Return the typical and the smallest count, and where they were seen."""
    seen = layer.train_data or layer.data
    if seen is not None and seen.batches:
        return seen.count / seen.batches, seen.smallest_count, "in a batch"
    counts = () if layer.execution is None else layer.execution.counts
    return (min(counts), min(counts), "on the example") if counts else (None, 0, "")


def _few(*, counts: tuple[int, ...] = (4,), **changes: object) -> ModelEvidence:
    return model(
        model_layer("bn", **{"execution": executed(counts=counts), "data": None, "train_data": None, **changes})
    )
