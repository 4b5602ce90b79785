"""Measures the metric under six choices of data and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bnlab.errors import BnlabError, UsageError
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.observe.passes.kept_batches import KeptBatches
from bnlab.observe.passes.population import Statistics, impose_batch_statistics, impose_statistics
from bnlab.observe.passes.subject import Subject
from bnlab.records import Numbers
from bnlab.wording import error_line

__all__ = ["Measured", "Metric", "Score", "measure", "measured", "metric_name", "paired_error"]

Metric = Callable[[nn.Module, Any], float]
"""metric(model, data) -> float."""


@dataclass(frozen=True)
class Score:
    """A metric, and the direction in which it is better.

    Attributes:
        metric: The metric.
        lower_is_better: Whether a lower value is better.
        name: The name of the metric in reports.
        errors: Number of standard errors by which it must be worse to count: 1 for a metric, 2 for a loss.
    """

    metric: Metric
    lower_is_better: bool = False
    name: str = "the metric"
    errors: float = 1.0

    def on(self, model: nn.Module, data: Iterable[Any]) -> float:
        """Return the metric of a model in eval mode.

        Raises:
            UsageError: If the metric raises, or does not return a number.
        """
        try:
            return float(self.metric(model.eval(), data))
        except BnlabError:
            raise
        except Exception as error:
            raise UsageError(f"metric: it must return a number, got {error_line(error)}") from error

    def on_all(self, model: nn.Module, data: KeptBatches) -> float:
        """Return the metric on the batches in use, or on the original data if the metric needs attributes of it."""
        if data.everything is not data or data.is_whole:
            return self.on(model, data.everything)
        try:
            return self.on(model, data)
        except BnlabError:
            return self.on(model, data.source)

    def on_each(self, model: nn.Module, data: KeptBatches) -> tuple[float, ...] | None:
        """Return the metric on each held batch alone; None if it is not defined on one batch."""
        try:
            return tuple(self.on(model, [batch]) for batch in data)
        except BnlabError:
            return None

    def higher(self, value: float) -> float:
        """Return a value with the sign with which higher is better."""
        return -value if self.lower_is_better else value


@dataclass(frozen=True)
class Measured:
    """The metric of a model as it is.

    Attributes:
        value: The metric on the whole data.
        per_batch: The metric on each batch alone; None if the metric is not defined on one batch.
        lower_is_better: Whether a lower value is better.
        errors: Number of standard errors by which it must be worse to count.
    """

    value: float
    per_batch: tuple[float, ...] | None
    lower_is_better: bool = False
    errors: float = 1.0

    def is_worse_than(self, before: Measured) -> bool:
        """Return whether the metric is worse by more than `errors` standard errors.

        The standard error is that of the paired difference over batches.
        Without values per batch, any worse metric counts. NaN is worse than every number.
        """
        if math.isnan(before.value):
            return False
        if math.isnan(self.value):
            return True
        lost = self.value - before.value if self.lower_is_better else before.value - self.value
        return lost > self.errors * (paired_error(self.per_batch, before.per_batch) or 0.0)


def measured(model: nn.Module, score: Score, data: KeptBatches) -> Measured:
    """Return the metric of a model in eval mode, on the data in use and on each held batch.

    The model is left in eval mode: the caller restores it.

    Raises:
        UsageError: If the metric raises on the data in use, or does not return a number.
    """
    return Measured(score.on_all(model, data), score.on_each(model, data), score.lower_is_better, score.errors)


def metric_name(metric: Metric) -> str:
    """Return the name of a metric, or "the metric" for one without a name."""
    name = str(getattr(metric, "__name__", "the metric"))
    return "the metric" if name.startswith("<") else name


def paired_error(
    left: Sequence[float] | Floats | None, right: Sequence[float] | Floats | None, weights: Floats | None = None
) -> float | None:
    """Return the standard error of the mean of paired differences; None for fewer than two finite differences.

    The mean is weighted if there are weights.
    """
    if left is None or right is None or len(left) != len(right) or len(left) < 2:
        return None
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    differences, shares = np.subtract(left, right), np.ones(len(left)) if weights is None else weights
    square = float((shares**2 * (differences - np.average(differences, weights=shares)) ** 2).sum())
    return math.sqrt(square * len(left) / (len(left) - 1)) / float(shares.sum())


def measure(
    subject: Subject,
    evidence: ModelEvidence,
    score: Score,
    recalibrated: Statistics,
    data: KeptBatches,
    train_data: KeptBatches | None,
    usable: KeptBatches | None,
) -> ModelEvidence:
    """Return the evidence with the six numbers and their errors.

    The numbers come from all batches in use, and the errors from the held batches alone.

    Args:
        subject: The model, which is unchanged afterwards.
        evidence: The evidence so far.
        score: The metric.
        recalibrated: The recalibrated statistics.
        data: The evaluation data.
        train_data: The training data; None without them.
        usable: The batches of `data` with more than one value per channel, on which batch statistics are measured; None
            without any. The metric with batch statistics is then NaN.

    Raises:
        UsageError: If the metric raises, or does not return a number.
    """
    model = subject.model

    def on_training() -> float | None:
        return None if train_data is None else score.on_all(model, train_data)

    def on_each() -> tuple[float, ...] | None:
        return None if usable is None else score.on_each(model, usable)

    with subject.untouched(), torch.no_grad():
        running, train_running = score.on_all(model, data), on_training()
        running_each = on_each()
        with impose_batch_statistics(model):
            train_batch, eval_batch = on_training(), math.nan if usable is None else score.on_all(model, usable)
            batch_each = on_each()
        with impose_statistics(recalibrated):
            eval_recalibrated, train_recalibrated = score.on_all(model, data), on_training()
            recalibrated_each = on_each()
    numbers = Numbers(
        train_batch=train_batch,
        eval_batch=eval_batch,
        eval_running=running,
        eval_recalibrated=eval_recalibrated,
        train_running=train_running,
        train_recalibrated=train_recalibrated,
        lower_is_better=score.lower_is_better,
    )
    return replace(
        evidence,
        numbers=numbers,
        metric_error=paired_error(batch_each, running_each),
        recalibrated_error=paired_error(recalibrated_each, running_each),
    )
