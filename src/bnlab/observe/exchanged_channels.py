"""Measures whether a network runs better on images whose channels 0 and 2 are exchanged: RGB for BGR.

The statistics of the layers cannot tell: on CIFAR-10 one of the 19 layers of a ResNet-20 shows the exchange, although
its accuracy falls from 0.997 to 0.873. The loss can, and it needs no training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnlab.errors import BnlabError
from bnlab.observe.losses import Losses, LossMeasure, own_loss, score_measure
from bnlab.observe.metric import Score
from bnlab.observe.model_evidence import ExchangedChannels
from bnlab.observe.passes.batches import parts_of, samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import KeptBatches, spread
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.observe.passes.tensors import map_tensors, tensors_in

__all__ = ["exchanged_channels"]

_BATCHES = 8
"""Number of batches that are measured."""

_FIRST_SAMPLES = 64
"""Number of samples on which the exchange must lower the loss before all batches are measured."""

_MIN_VALUES = 4
"""Number of values without which the spread of a difference is not known."""

_MIN_GAIN_OF_LOSS = 0.1
"""Share of the loss that the exchange removes at least."""

_MIN_GAIN_OF_METRIC = 0.02
"""Share of the metric that the exchange adds at least."""


def exchanged_channels(
    subject: Subject,
    data: KeptBatches,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    score: Score | None,
) -> ExchangedChannels | None:
    """Return by how much a network runs better with channels 0 and 2 of its images exchanged; None if it does not.

    The images are the inputs of the model of shape (N, 3, height, width). The loss decides, or else the metric of
    single batches: it must be better by more than two standard errors of the paired difference, and by 10 % of a loss
    or 2 % of a metric, with running statistics and with batch statistics. Where labels give the loss, it must also be
    below that of a constant output.

    Args:
        subject: The model, which is unchanged afterwards.
        data: The finite batches of the evaluation data.
        loss: loss(model, batch) -> scalar; None for the cross-entropy, where there are labels.
        score: The metric, or the mean loss in its place; None with neither.
    """
    batches = spread(data, _BATCHES)
    if not any(_is_color(tensor) for batch in batches[:1] for tensor in tensors_in(batch)):
        return None
    try:
        with subject.untouched(), torch.no_grad(), usage_error_unless("forward must run on every batch"):
            return _measured(subject, batches, loss, score)
    except BnlabError:  # nothing that is measured on a few batches, or with batch statistics
        return None


def _measured(
    subject: Subject,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    score: Score | None,
) -> ExchangedChannels | None:
    model, least_gain = subject.model, _MIN_GAIN_OF_LOSS
    measure, parts = own_loss(model, loss, batches, subject.forward), batches
    if measure is None and score is not None:
        measure, least_gain = score_measure(score), _MIN_GAIN_OF_METRIC
        pieces = -(-_BATCHES // len(batches))
        parts = [part for batch in batches for part in parts_of(batch, pieces)]
    if measure is None:
        return None
    own, exchanged = _pair(subject, measure, _first(parts))
    if not exchanged.mean < own.mean:
        return None
    own, exchanged = _pair(subject, measure, parts)
    if not _is_better(exchanged, own, least_gain):
        return None
    if measure.chance is not None and exchanged.mean >= measure.chance(batches):
        return None
    with impose_batch_statistics(model):
        by_batch, by_batch_exchanged = _pair(subject, measure, parts)
    if not _is_better(by_batch_exchanged, by_batch, least_gain):
        return None
    if score is None:
        return ExchangedChannels(name=measure.name, value=own.mean, exchanged=exchanged.mean, batches=len(batches))
    value = score.on(model, batches)
    with _exchanging(subject):
        value_exchanged = score.on(model, batches)
    if score.higher(value_exchanged) < score.higher(value):
        return None
    return ExchangedChannels(name=score.name, value=value, exchanged=value_exchanged, batches=len(batches))


def _first(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batches that hold `_FIRST_SAMPLES` samples together."""
    samples = accumulate(map(samples_in, batches), initial=0)
    return [batch for batch, before in zip(batches, samples, strict=False) if before < _FIRST_SAMPLES]


def _pair(subject: Subject, measure: LossMeasure, batches: Sequence[Batch]) -> tuple[Losses, Losses]:
    """Return the losses on the images as they are, and on those with channels 0 and 2 exchanged."""
    own = measure.of(subject.model, batches)
    with _exchanging(subject):
        return own, measure.of(subject.model, batches)


def _is_better(losses: Losses, others: Losses, least_gain: float) -> bool:
    """Return whether losses are lower by more than two standard errors, and by a share of the others."""
    difference = others.above(losses)
    known = len(others.values) >= _MIN_VALUES and difference.is_positive
    return known and difference.mean > least_gain * abs(others.mean)


@contextmanager
def _exchanging(subject: Subject) -> Iterator[None]:
    """Exchange channels 0 and 2 of the images that the model gets, inside the block."""
    with subject.with_hooks([subject.model], _exchange_before_forward):
        yield


def _exchange_before_forward(model: nn.Module) -> RemovableHandle:
    def exchange(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        return map_tensors(arguments, _exchanged), map_tensors(keywords, _exchanged)

    return model.register_forward_pre_hook(exchange, with_kwargs=True)


def _exchanged(tensor: Tensor) -> Tensor:
    return tensor.flip(1) if _is_color(tensor) else tensor


def _is_color(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.size(1) == 3 and tensor.is_floating_point()
