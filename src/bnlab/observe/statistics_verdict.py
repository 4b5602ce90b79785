"""Decides whether the weights need the stored running statistics or those of the training data.

A network that was trained with its BN in eval mode needs the stored statistics, however far they are from those of its
training data. The loss on the training data tells the two apart: it is compared between the stored statistics and
statistics that are recalibrated on the other half of the batches, both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.observe.losses import Losses, LossMeasure
from bnlab.observe.passes.batches import parts_of, shuffled_batches
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import KeptBatches, spread
from bnlab.observe.passes.pooling import pool
from bnlab.observe.passes.population import Statistics, impose_statistics
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.records import Advice, StatisticsVerdict

__all__ = ["decide", "pooled_statistics", "trained_with_batches"]

_MAX_BATCHES = 32
"""Number of batches on which the loss is compared."""

_MAX_SEARCH_BATCHES = 8
"""Number of batches on which sets of layers are compared."""

_MAX_LAYERS = 8
"""Number of layers, the most stale first, that are tried one by one."""


def decide(
    subject: Subject,
    stale: Mapping[str, nn.Module],
    measures: Iterable[LossMeasure],
    reference: KeptBatches,
    data: KeptBatches | None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> StatisticsVerdict:
    """Return the verdict on the stale layers of a model, which is unchanged afterwards.

    Several stale layers are judged together, unless a part of them lowers the loss more: the layers that help are then
    chosen one after the other.

    Args:
        subject: The model.
        stale: The layers whose statistics are not those of the training data, the most stale first.
        measures: The losses, of which the first that can decide does.
        reference: The training data, or else the evaluation data.
        data: The evaluation data; None if they are the reference.
        advance: Called after every batch of a pass for statistics.

    Raises:
        UsageError: If forward, the loss or the metric raises.
    """
    layers = {path: layer for path, layer in stale.items() if isinstance(layer, _BatchNorm)}
    name = "data" if data is None else "train_data"
    undecided = StatisticsVerdict(advice=Advice.UNDECIDED, layers=tuple(stale), data=name)
    halves = _halves(reference)
    if len(layers) < len(stale) or halves is None:
        return undecided
    for measure in measures:
        verdict = _verdict_of(_Judge(subject, layers, measure, *halves, advance), undecided, data)
        if verdict.advice is not Advice.UNDECIDED:
            return verdict
    return undecided


def _verdict_of(judge: _Judge, undecided: StatisticsVerdict, data: KeptBatches | None) -> StatisticsVerdict:
    """Return the verdict of one loss, or `undecided` where it cannot decide."""
    try:
        with usage_error_unless("forward must run on a part of the data"):
            chosen = _chosen(judge.searching(), undecided.layers)
            running, recalibrated = judge.running, judge.recalibrated(chosen)
    except UsageError:  # half of the data gives no statistics, or a part of the data has no loss
        return undecided
    if not judge.is_below_chance(running) and not judge.is_below_chance(recalibrated):
        return undecided  # the labels are not what the network predicts, or it predicts nothing
    difference = running.above(recalibrated)
    verdict = replace(
        undecided,
        advice=Advice.NO_DIFFERENCE,
        layers=chosen,
        decided_by=judge.measure.name,
        running=running.mean,
        recalibrated=recalibrated.mean,
        standard_error=difference.standard_error,
    )
    if difference.is_negative:
        return replace(verdict, advice=Advice.KEEP)
    if not difference.is_positive:
        return verdict
    verdict = replace(verdict, advice=Advice.RECALIBRATE)
    return verdict if data is None else _with_veto(verdict, judge, data)


def trained_with_batches(
    subject: Subject, layers: Mapping[str, nn.Module], measure: LossMeasure, reference: KeptBatches
) -> bool:
    """Return whether the loss shows that the weights were trained with the batch statistics of some layers.

    The running statistics then lag behind the weights, so that recalibrated ones lower the loss by more than two
    standard errors. Weights that were trained with the running statistics fit these better.

    Args:
        subject: The model, which is unchanged afterwards.
        layers: The layers, all of them with the statistics of the training data.
        measure: The loss.
        reference: The training data.
    """
    chosen = {path: layer for path, layer in layers.items() if isinstance(layer, _BatchNorm)}
    halves = _halves(reference)
    if halves is None or not chosen:
        return False
    judge = _Judge(subject, chosen, measure, *halves, lambda: None)
    try:
        with usage_error_unless("forward must run on a part of the data"):
            running, recalibrated = judge.running, judge.recalibrated(tuple(chosen))
    except UsageError:
        return False
    return judge.is_below_chance(running) and running.above(recalibrated).is_positive


def pooled_statistics(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    advance: Callable[[], None] = lambda: None,
) -> Statistics:
    """Return the statistics that recalibration of some layers, and of no other, would store.

    Raises:
        UsageError: If no batch is usable, or forward raises.
    """
    pooling = pool(subject, layers, batches, advance=advance)
    pooled = {layers[path]: (one.mean, one.population_var) for path, one in pooling.layers.items()}
    return {layer: values for layer, values in pooled.items() if isinstance(layer, _BatchNorm)}


def _halves(reference: KeptBatches) -> tuple[list[Batch], list[Batch]] | None:
    """Return two halves of the batches in use, or of a single batch; None for too few samples or batches.

    The halves follow the Thue-Morse sequence, so that batches of two kinds in turn reach both of them.
    """
    batches = spread(reference, _MAX_BATCHES)
    if len(batches) == 1:
        batches = list(parts_of(batches[0], 2))
    halves: tuple[list[Batch], list[Batch]] = ([], [])
    for index, batch in enumerate(batches):
        halves[index.bit_count() % 2].append(batch)  # no period of the loader, such as two domains in turn, fits
    return halves if halves[1] else None


@dataclass(frozen=True)
class _Judge:
    """Measures the loss with the stored statistics, and with those of the other half of the batches.

    Attributes:
        subject: The model.
        layers: The layers that may be recalibrated.
        measure: The loss.
        left: One half of the batches.
        right: The other half.
        advance: Called after every batch of a pass for statistics.
    """

    subject: Subject
    layers: Mapping[str, _BatchNorm]
    measure: LossMeasure
    left: Sequence[Batch]
    right: Sequence[Batch]
    advance: Callable[[], None]

    def is_below_chance(self, losses: Losses) -> bool:
        """Return whether the losses are below that of a constant output, as those of a trained network are."""
        chance = self.measure.chance
        return chance is None or losses.mean < chance([*self.left, *self.right])

    def searching(self) -> _Judge:
        """Return a judge that uses a few of the batches, spread over all of them: data may be sorted by class."""
        count = _MAX_SEARCH_BATCHES // 2
        return replace(self, left=spread(self.left, count), right=spread(self.right, count))

    @cached_property
    def running(self) -> Losses:
        """The losses with the stored statistics."""
        return self._losses({}, self.left).joined(self._losses({}, self.right))

    def recalibrated(self, names: Sequence[str]) -> Losses:
        """Return the losses after some layers were recalibrated on the other half."""
        of_left, of_right = self._statistics(names, self.left), self._statistics(names, self.right)
        return self._losses(of_right, self.left).joined(self._losses(of_left, self.right))

    def on(self, data: Sequence[Batch], names: Sequence[str]) -> tuple[Losses, Losses]:
        """Return the losses on other data with the stored statistics, and after recalibration on both halves."""
        statistics = self._statistics(names, [*self.left, *self.right])
        return self._losses({}, data), self._losses(statistics, data)

    def _statistics(self, names: Sequence[str], batches: Sequence[Batch]) -> Statistics:
        # Batches that are sorted by class would give the wrong statistics: their samples are mixed where they can be.
        mixed = shuffled_batches(batches, self.subject.inputs_taken(batches)) or batches
        return pooled_statistics(self.subject, {name: self.layers[name] for name in names}, mixed, self.advance)

    def _losses(self, statistics: Statistics, batches: Sequence[Batch]) -> Losses:
        with self.subject.untouched(), torch.no_grad(), impose_statistics(statistics):
            return self.measure.of(self.subject.model, batches)


def _chosen(judge: _Judge, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return all layers, or those that lower the loss further, chosen one after the other."""
    if len(names) == 1:
        return names
    together = judge.recalibrated(names)
    candidates = names[:_MAX_LAYERS]
    chosen: tuple[str, ...] = ()
    current = judge.running
    while len(chosen) < len(candidates):
        rest = [name for name in candidates if name not in chosen]
        tried: dict[str, Losses] = {}
        for name in rest:
            with suppress(UsageError):  # behind a layer whose statistics are no numbers
                tried[name] = judge.recalibrated((*chosen, name))
        finite = [name for name, losses in tried.items() if math.isfinite(losses.mean)]
        if not finite:
            break
        best = min(finite, key=lambda name: tried[name].mean)
        if not current.above(tried[best]).is_positive:
            break
        if not chosen and not together.above(tried[best]).is_positive:
            return names
        chosen, current = (*chosen, best), tried[best]
    return chosen if chosen and together.above(current).is_positive else names


def _with_veto(verdict: StatisticsVerdict, judge: _Judge, data: KeptBatches) -> StatisticsVerdict:
    """Withdraw the advice if the loss on the evaluation data gets worse; data without labels have no veto."""
    if not len(data):
        return verdict
    try:
        running, recalibrated = judge.on(spread(data, _MAX_BATCHES), verdict.layers)
    except UsageError:
        return verdict
    verdict = replace(verdict, data_running=running.mean, data_recalibrated=recalibrated.mean)
    worse = running.above(recalibrated).is_negative
    return replace(verdict, advice=Advice.WORSE_ON_DATA) if worse else verdict
