"""BN610: training with few values per channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from bnlab.checks.cases import run_of, step_of
from bnlab.checks.check import Case, Group, Needs, RunCheck, limit, show
from bnlab.conventions import FEW_VALUES, FEW_VALUES_SOURCE
from bnlab.observe.training_run import StepOfLayer, TrainingRun
from bnlab.records import Finding, Quantity

__all__ = ["TinyBatches"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN610."""

    count: float = limit(
        FEW_VALUES,
        unit="values per channel",
        source=FEW_VALUES_SOURCE,
    )


class TinyBatches(RunCheck[Limits]):
    """Training steps whose batches have few values per channel.

    ## What it does
    The check counts the values per channel, N*prod(spatial), of the batches that update a layer.

    ## Why it matters
    Batch statistics of few values are noise, and eval mode does without it. The gain 1/std is also too high on average,
    so that eval mode computes a different function. The batch size alone does not show this: layers behind a pooling
    and late 1x1 maps have N values only, gradient accumulation does not add any, and each process of DDP has its own
    share of the batch.

    ## Evidence
    The watch reads the shape of each input. The largest count of a step decides, so that a step with one small
    micro-batch is none. A small last batch of an epoch is followed by a full one and causes no finding. The check skips
    SyncBatchNorm, which uses the values of all processes, and BatchRenorm, which is made for small batches. A frozen
    layer does not use the batch.

    ## Threshold
    Two steps in a row that update the layer have fewer than 16 values. Wu and Johnson observe a loss of accuracy from
    batches of 8 images downwards.

    ## Remedy
    `manual`: use a larger batch, `drop_last=True`, SyncBatchNorm, BatchRenorm or GroupNorm (`bnlab.convert`). For
    fine-tuning use `freeze`: with batches of two images it gave an error of 25.2 % instead of 32.5 %.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), figures 5 and 6, and appendix A.5; Ioffe 2017 (arXiv 1702.03275);
    docs/background.md, "Small counts".
    """

    code, group, needs = "BN610", Group.NOTE, Needs.RUN
    remedies = ("freeze", "manual")
    why = "batch statistics of so few values are noise, and eval mode normalises without this noise"
    limits = Limits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first of two such steps in a row."""
        for layer in evidence.layers:
            if layer.reads_other_ranks or not any(step.count < self.limits.count for step in layer.steps):
                continue
            steps = [step for step in layer.steps if step.updates]
            pair = next((pair for pair in pairwise(steps) if self._is_tiny(pair[0]) and self._is_tiny(pair[1])), None)
            if pair is None:
                continue
            few = [step.count for step in steps if self._is_tiny(step)]
            yield self.event(
                layer,
                pair[0].step,
                f"batches of {_range(few)} values per channel update the layer in steps in a row, must be >= "
                f"{show(self.limits.count)}",
                measured={
                    "smallest count": Quantity(min(few), "values per channel"),
                    "largest count": Quantity(max(few), "values per channel"),
                },
                threshold={"largest count": Quantity(self.limits.count, "values per channel")},
            )

    def _is_tiny(self, step: StepOfLayer) -> bool:
        return 0 < step.count < self.limits.count

    CLEAN = (
        Case("1568 values", run_of),
        Case("16 values", lambda: _with_counts(16, 16, 16)),
        Case("a small last batch in each epoch", lambda: _with_counts(256, 256, 2, 256, 256, 2, 256)),
        Case("one batch so far", lambda: _with_counts(2)),
        Case("other processes have more", lambda: _with_counts(4, 4, 4, reads_other_ranks=True)),
        Case("the shapes are not known", lambda: _with_counts(0, 0, 0)),
        Case("in eval mode", lambda: run_of(*(step_of(step, updates=0, count=0) for step in range(3)))),
    )
    BROKEN = (
        Case(
            "batches of 4 behind a pooling",
            lambda: _with_counts(4, 4, 3, 4),
            layers=("bn",),
            measured={"step": 0, "smallest count": 3, "largest count": 4},
        ),
        Case("the batches shrink", lambda: _with_counts(64, 8, 8), layers=("bn",), measured={"step": 1}),
        Case(
            "with a step in between that does not use the layer",
            lambda: run_of(step_of(count=2), step_of(1, updates=0, count=0), step_of(2, count=2)),
            layers=("bn",),
        ),
    )


def _range(counts: list[int]) -> str:
    least, largest = min(counts), max(counts)
    return str(least) if least == largest else f"{least} to {largest}"


def _with_counts(*counts: int, **changes: object) -> TrainingRun:
    return run_of(*(step_of(step, count=count) for step, count in enumerate(counts)), **changes)
