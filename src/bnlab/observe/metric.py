"""The metric of a model under four choices of data and statistics, and the layers that cost it."""

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

_MOST_LAYERS = 8
_ENOUGH = 0.9


@dataclass(frozen=True)
class Measured:
    """The metric of a model as it is.

    Attributes:
        value: On the whole data.
        per_batch: On each batch alone; None if a batch alone has no metric.
    """

    value: float
    per_batch: tuple[float, ...] | None

    def is_worse_than(self, before: Measured) -> bool:
        """Whether the metric is lower by more than one standard error of the paired difference over batches.

        Without values per batch, whether it is lower at all. No number at all is worse than any.
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
    """Return the metric of a model in eval mode, on what is to be used and on each held batch. It is untouched.

    Raises:
        UsageError: If the metric raises on all of them, or returns no number.
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
    """Return the evidence with the four numbers, their error, and the layers whose statistics cost the metric.

    The numbers are taken on everything that is to be used; the error and the layers on the batches that are held. Batch
    statistics are those of the `usable` batches of `data`: those with more than one value per channel.

    Raises:
        UsageError: If the metric raises, or returns no number.
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
    """Return the metric on what is to be used; on the data themselves where it wants to know more than a part tells."""
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
    """Return the standard error of eval_batch - eval_running over batches; None if a batch alone has no metric."""
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
    """Return the standard error of the mean of paired differences; None if it is not known."""
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
    """Replace the statistics of the most stale layers, one after the other, until the metric is back.

    Only the held batches are used: so many passes over data that are not held would read them from the disk each time.
    """
    if not max(numbers.eval_batch, numbers.eval_recalibrated) > numbers.eval_running:
        return ()
    stale = sorted((layer for layer in layers if layer.gap is not None), key=lambda layer: -_excess(layer))
    candidates = [(layer.name, modules[layer.name]) for layer in stale[:_MOST_LAYERS]]
    mendable = [
        (name, module) for name, module in candidates if isinstance(module, _BatchNorm) and module in population
    ]

    def value_with(count: int) -> float:
        with impose_statistics({module: population[module] for _, module in mendable[:count]}):
            return _metric(model, metric, data)

    try:
        running, best = _bounds_on_held(model, metric, data, numbers, population)
        enough = running + _ENOUGH * (best - running)
        if not best > running or (len(mendable) > 1 and not value_with(len(mendable)) >= enough):
            return ()  # where all of them are too few, one after the other need not be tried
        values: list[tuple[str, float]] = []
        for count, (name, _) in enumerate(mendable, start=1):
            values.append((name, value_with(count)))
            if values[-1][1] >= enough:
                return tuple(values)
    except BnlabError:  # the metric wants to know more than a part of the data tells
        return ()
    return ()


def _bounds_on_held(
    model: nn.Module,
    metric: Metric,
    data: KeptBatches,
    numbers: Numbers,
    population: Mapping[_BatchNorm, tuple[Floats, Floats]],
) -> tuple[float, float]:
    """Return the metric with running statistics, and the better one of those it may get back to, on the held batches.

    Where nothing but the held batches is used, they are the numbers.
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
