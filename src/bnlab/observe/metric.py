"""Measures the metric under four choices of data and statistics, and finds the layers that lower it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import BnlabError, UsageError
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.observe.passes.batches import KeptBatches
from bnlab.observe.passes.population import impose_batch_statistics, impose_statistics, population_statistics
from bnlab.observe.passes.subject import Subject, untouched
from bnlab.records import Numbers

__all__ = ["Measured", "Metric", "measure", "measured"]

Metric = Callable[[nn.Module, Any], float]
"""metric(model, data) -> float, higher is better."""

_MAX_LAYERS = 8
"""Number of layers, the most stale first, whose statistics are replaced to recover the metric."""

_RECOVERED_SHARE = 0.9
"""Share of the lost metric at which the metric counts as recovered."""


@dataclass(frozen=True)
class Measured:
    """The metric of a model as it is.

    Attributes:
        value: The metric on the whole data.
        per_batch: The metric on each batch alone; None if the metric is not defined on one batch.
    """

    value: float
    per_batch: tuple[float, ...] | None

    def is_worse_than(self, before: Measured) -> bool:
        """Return whether the metric is lower by more than one standard error of the paired difference over batches.

        Without values per batch, any lower metric is worse. NaN is worse than every number.
        """
        if math.isnan(before.value):
            return False
        if math.isnan(self.value):
            return True
        return before.value - self.value > self._standard_error(before)

    def _standard_error(self, before: Measured) -> float:
        if self.per_batch is None or before.per_batch is None or len(self.per_batch) != len(before.per_batch):
            return 0.0
        return _standard_error(np.subtract(self.per_batch, before.per_batch).tolist()) or 0.0


def measured(model: nn.Module, metric: Metric, data: KeptBatches) -> Measured:
    """Return the metric of a model in eval mode, on the data in use and on each held batch.

    The model is unchanged afterwards.

    Raises:
        UsageError: If the metric raises on the data in use, or does not return a number.
    """
    with untouched(model), torch.no_grad():
        value = _metric_of_all(model, metric, data)
        try:
            per_batch = tuple(_metric(model, metric, [batch]) for batch in data)
        except BnlabError:
            return Measured(value, None)
    return Measured(value, per_batch)


def measure(
    subject: Subject,
    modules: Mapping[str, nn.Module],
    evidence: ModelEvidence,
    metric: Metric,
    data: KeptBatches,
    train_data: KeptBatches | None,
    usable: KeptBatches,
) -> ModelEvidence:
    """Return the evidence with the four numbers, their error, and the layers whose statistics lower the metric.

    The numbers come from all batches in use; the error and the layers come from the held batches alone. Batch
    statistics are measured on `usable`, the batches of `data` with more than one value per channel.

    Raises:
        UsageError: If the metric raises, or does not return a number.
    """
    model = subject.model
    population = population_statistics(modules, evidence.layers)
    with subject.untouched(), torch.no_grad():
        running = _metric_of_all(model, metric, data)
        with impose_batch_statistics(model):
            train_batch = None if train_data is None else _metric_of_all(model, metric, train_data)
            eval_batch = _metric_of_all(model, metric, usable)
        with impose_statistics(population):
            recalibrated = _metric_of_all(model, metric, data)
        numbers = Numbers(
            train_batch=train_batch, eval_batch=eval_batch, eval_running=running, eval_recalibrated=recalibrated
        )
        error = _paired_error(model, metric, usable)
        causal = _causal(model, modules, evidence.layers, metric, usable, numbers, population)
    return replace(evidence, numbers=numbers, metric_error=error, causal=causal)


def _metric_of_all(model: nn.Module, metric: Metric, data: KeptBatches) -> float:
    """Return the metric on the batches in use, or on the original data if the metric needs attributes of it."""
    if data.everything is not data or data.is_whole:
        return _metric(model, metric, data.everything)
    try:
        return _metric(model, metric, data)
    except BnlabError:
        return _metric(model, metric, data.source)


def _metric(model: nn.Module, metric: Metric, data: Iterable[Any]) -> float:
    try:
        return float(metric(model.eval(), data))
    except BnlabError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"metric: it must return a number, got {type(error).__name__}: {text[:300]}") from error


def _paired_error(model: nn.Module, metric: Metric, data: KeptBatches) -> float | None:
    """Return the standard error of eval_batch - eval_running over batches; None if one batch has no metric."""
    differences = []
    try:
        for batch in data:
            running = _metric(model, metric, [batch])
            with impose_batch_statistics(model):
                differences.append(_metric(model, metric, [batch]) - running)
    except BnlabError:
        return None
    return _standard_error(differences)


def _standard_error(differences: Sequence[float]) -> float | None:
    """Return the standard error of the mean of paired differences; None for fewer than two finite differences."""
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences)))


def _causal(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layers: Iterable[ModelLayer],
    metric: Metric,
    data: KeptBatches,
    numbers: Numbers,
    population: Mapping[_BatchNorm, tuple[Floats, Floats]],
) -> tuple[tuple[str, float], ...]:
    """Replace the statistics of the most stale layers, one after the other, until the metric has recovered.

    Only the held batches are used, because each of the many passes would otherwise read the data from the disk again.
    """
    if not max(numbers.eval_batch, numbers.eval_recalibrated) > numbers.eval_running:
        return ()
    stale = sorted((layer for layer in layers if layer.gap is not None), key=lambda layer: -_excess(layer))
    candidates = [(layer.name, modules[layer.name]) for layer in stale[:_MAX_LAYERS]]
    replaceable = [
        (name, module) for name, module in candidates if isinstance(module, _BatchNorm) and module in population
    ]

    def value_with(count: int) -> float:
        with impose_statistics({module: population[module] for _, module in replaceable[:count]}):
            return _metric(model, metric, data)

    try:
        running, best = _bounds_on_held(model, metric, data, numbers, population)
        recovered = running + _RECOVERED_SHARE * (best - running)
        if not best > running or (len(replaceable) > 1 and not value_with(len(replaceable)) >= recovered):
            return ()  # replacing all of them is not enough, so no smaller set is tried
        values: list[tuple[str, float]] = []
        for count, (name, _) in enumerate(replaceable, start=1):
            values.append((name, value_with(count)))
            if values[-1][1] >= recovered:
                return tuple(values)
    except BnlabError:  # the metric needs attributes that a part of the data lacks
        return ()
    return ()


def _bounds_on_held(
    model: nn.Module,
    metric: Metric,
    data: KeptBatches,
    numbers: Numbers,
    population: Mapping[_BatchNorm, tuple[Floats, Floats]],
) -> tuple[float, float]:
    """Return the metric with running statistics and the best metric that other statistics reach, on the held batches.

    Where only the held batches are in use, both are among the four numbers already.
    """
    if data.everything is data:
        return numbers.eval_running, max(numbers.eval_batch, numbers.eval_recalibrated)
    running = _metric(model, metric, data)
    with impose_batch_statistics(model):
        by_batch = _metric(model, metric, data)
    with impose_statistics(population):
        return running, max(by_batch, _metric(model, metric, data))


def _excess(layer: ModelLayer) -> float:
    return 0.0 if layer.gap is None else layer.gap.excess
