"""BN604: running statistics that differ between ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import run_of
from bnlab.checks.check import Case, Group, Needs, RunCheck, limit, show
from bnlab.observe.training_run import RankSpread, TrainingRun
from bnlab.records import Finding, Quantity

__all__ = ["RankDivergence"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN604."""

    difference: float = limit(
        0.1,
        unit="standard deviations",
        source="what two ranks with batches of 11 independent values differ by at momentum 0.1; BN401 begins at 0.35",
    )
    factor: float = limit(
        3, unit="times what chance explains", source="two ranks and one channel exceed it by chance in 0.3 % of cases"
    )


class RankDivergence(RunCheck[Limits]):
    """Running statistics that differ between ranks by more than their batches explain.

    ## What it does
    The check compares the running statistics of all ranks, and the difference with the noise of their batches.

    ## Why it matters
    Each rank updates its own buffers. If nothing keeps them together, the ranks evaluate different networks, and the
    checkpoint holds the statistics of the rank that writes it. Ranks that see the same kind of data differ by chance
    alone. A larger difference means that they see other data, have other weights, or that one of them ran more forward
    passes in train mode, such as a validation on rank 0.

    ## Evidence
    The watch gathers the running statistics of all ranks at sampled steps. The difference is the root mean square over
    channels of the largest difference between two ranks, in standard deviations. What chance explains follows from the
    noise of a batch and from the momentum. `DistributedDataParallel` with its default `broadcast_buffers=True` sends
    the buffers of rank 0 to the others before each forward pass, so that one update alone can differ.

    ## Threshold
    The check reports a difference above `difference` that is also more than `factor` times what chance explains.

    ## Remedy
    `manual`: give all ranks shuffled parts of the data (`DistributedSampler` with `set_epoch`), and keep
    `broadcast_buffers=True` or use SyncBatchNorm. Pool the statistics of the ranks before you save or evaluate, with
    the variance between them.

    ## Sources
    timm issue 110 (https://github.com/huggingface/pytorch-image-models/issues/110); mmdetection issue 2539
    (https://github.com/open-mmlab/mmdetection/issues/2539); PyTorch issue 30718
    (https://github.com/pytorch/pytorch/issues/30718); docs/background.md, "Several processes".
    """

    code, group, needs = "BN604", Group.SUSPICIOUS, Needs.RUN
    remedies = ("manual",)
    why = "every rank evaluates another network, and the checkpoint holds the statistics of one of them"
    limits = Limits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer whose ranks differ."""
        largest, factor = self.limits.difference, self.limits.factor
        for layer in evidence.layers:
            spread = layer.ranks
            if spread is None or not spread.difference > max(largest, factor * spread.expected):
                continue
            yield self.event(
                layer,
                spread.step,
                f"running statistics differ by {show(spread.difference)} standard deviations between {spread.ranks} "
                f"ranks, must be <= {show(largest)}, or <= {show(factor)} times the {show(spread.expected)} that the "
                "noise of their batches explains; compare what the ranks run on, and use SyncBatchNorm or "
                "broadcast_buffers=True",
                measured={
                    "difference": Quantity(spread.difference, "standard deviations"),
                    "difference by chance": Quantity(spread.expected, "standard deviations"),
                },
                threshold={"difference": Quantity(max(largest, factor * spread.expected), "standard deviations")},
            )

    CLEAN = (
        Case("one process", run_of),
        Case("what the noise of small batches explains", lambda: _spread(0.5, 0.2)),
        Case("a small difference between ranks with hardly any noise", lambda: _spread(0.09, 0.001)),
        Case("a rank with NaN, which BN601 reports", lambda: _spread(float("nan"), 0.01)),
    )
    BROKEN = (
        Case(
            "each rank has its own part of a sorted data set",
            lambda: _spread(0.8, 0.05),
            layers=("bn",),
            measured={"step": 100, "difference": 0.8, "difference by chance": 0.05},
        ),
    )


def _spread(difference: float, expected: float) -> TrainingRun:
    return run_of(ranks=RankSpread(step=100, ranks=4, difference=difference, expected=expected))
