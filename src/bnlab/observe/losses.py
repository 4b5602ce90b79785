"""Measures the loss of a model sample by sample, so that two sets of running statistics are compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlab.errors import BnlabError, UsageError
from bnlab.functional.moments import widened
from bnlab.observe.evidence import Floats
from bnlab.observe.labels import IGNORED, classes_and_fit, classes_of, labels_of, scores_of
from bnlab.observe.metric import Score, paired_error
from bnlab.observe.passes.batches import parts_of, samples_in
from bnlab.observe.passes.calling import Batch, Forward, inputs_taken, run_batch
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.transfers import to_host
from bnlab.wording import error_line

__all__ = [
    "Difference",
    "LossMeasure",
    "Losses",
    "cross_entropies",
    "cross_entropy_measure",
    "loss_measure",
    "mean_loss",
    "own_loss",
    "score_measure",
]

_MIN_VALUES = 16
"""Number of values that the batches of a data set give at least, if they are large enough to be cut into parts."""


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of samples or of parts of batches, in a fixed order. Both arrays have the shape (n,), float64.

    Attributes:
        values: Mean loss of each sample or part; lower is better.
        weights: Samples in each.
    """

    values: Floats
    weights: Floats

    @property
    def mean(self) -> float:
        """The mean over samples."""
        return float(np.average(self.values, weights=self.weights))

    def joined(self, other: Losses) -> Losses:
        """Return these losses, followed by others."""
        return Losses(np.concatenate([self.values, other.values]), np.concatenate([self.weights, other.weights]))

    def above(self, other: Losses) -> Difference:
        """Return by how much these losses are above others of the same samples."""
        if not np.isfinite(other.values).all() or not np.isfinite(self.values).all():
            gained = np.isfinite(other.values).sum() - np.isfinite(self.values).sum()
            return Difference(math.copysign(math.inf, gained), 0.0) if gained else Difference(math.nan, math.nan)
        error = paired_error(self.values, other.values, self.weights)
        mean = float(np.average(self.values - other.values, weights=self.weights))
        return Difference(mean, math.inf if error is None else error)


@dataclass(frozen=True)
class Difference:
    """A mean paired difference of losses, and its standard error."""

    mean: float
    standard_error: float

    @property
    def is_positive(self) -> bool:
        """Whether the difference is above 0 by more than two standard errors."""
        return self.mean > 2 * self.standard_error

    @property
    def is_negative(self) -> bool:
        """Whether the difference is below 0 by more than two standard errors."""
        return self.mean < -2 * self.standard_error


@dataclass(frozen=True, eq=False)
class BatchLosses:
    """The losses on one batch, which may wait on a device.

    Attributes:
        values: Mean loss of each sample or part, each of one number.
        weights: Samples in each. Shape (n,), float64.
        fits: Whether the labels of the batch are labels; None where nothing depends on it.
    """

    values: Sequence[Tensor]
    weights: Floats
    fits: Tensor | None = None


@dataclass(frozen=True)
class LossMeasure:
    """A loss that a model has on batches.

    Attributes:
        name: The name of the loss in reports.
        of_batch: Returns the losses of a model on one batch.
        chance: Returns the loss that a constant output reaches on some batches; None where that is not known.
    """

    name: str
    of_batch: Callable[[nn.Module, Batch], BatchLosses]
    chance: Callable[[Iterable[Batch]], float] | None = None

    def of(self, model: nn.Module, data: Iterable[Batch]) -> Losses:
        """Return the losses of a model in eval mode on every batch, which the host reads from a device together.

        Raises:
            UsageError: If forward or the loss raises.
        """
        model.eval()
        with torch.no_grad():
            batches = [self.of_batch(model, batch) for batch in batches_of(data, model)]
        fits = to_host([batch.fits for batch in batches if batch.fits is not None])
        if not all(one.numpy() for one in fits):
            raise _other_labels()
        values = to_host([value.detach() for batch in batches for value in batch.values])
        return Losses(
            np.concatenate([value.to(torch.float64).numpy().reshape(-1) for value in values]),
            np.concatenate([batch.weights for batch in batches]),
        )


def loss_measure(loss: Callable[[nn.Module, Any], Tensor], batches: int) -> LossMeasure:
    """Return the measure of a loss(model, batch) -> scalar.

    Args:
        loss: The loss.
        batches: Number of batches that are measured. A few batches are cut into parts, so that their spread is known.
    """
    parts = -(-_MIN_VALUES // max(1, batches))

    def of_batch(model: nn.Module, batch: Batch) -> BatchLosses:
        if parts > 1:
            with suppress(Exception):  # a batch that cannot be cut, such as a graph, is measured as a whole
                return _values_of(loss, model, parts_of(batch, parts))
        try:
            return _values_of(loss, model, [batch])
        except BnlabError:
            raise
        except Exception as error:
            raise UsageError(f"loss: it must be a scalar of model and batch, got {error_line(error)}") from error

    return LossMeasure("loss", of_batch)


def _values_of(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, parts: Iterable[Batch]) -> BatchLosses:
    values = [(_number(loss(model, part)), float(max(1, samples_in(part)))) for part in parts]
    return BatchLosses([value for value, _ in values], np.array([weight for _, weight in values], dtype=np.float64))


def _number(value: Tensor | float) -> Tensor:
    """Return a loss as a tensor of one number, on its device.

    Raises:
        RuntimeError: If it holds several numbers, or none.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach()
    return torch.tensor(float(value), dtype=torch.float64)


def cross_entropy_measure(model: nn.Module, data: Iterable[Batch], forward: Forward = run_batch) -> LossMeasure | None:
    """Return the cross-entropy if integer labels stand beside an output of shape (N, K, ...); None otherwise.

    Args:
        model: A model in eval mode.
        data: Batches, of which the first decides.
        forward: Calls the model on a batch.
    """
    with torch.no_grad():
        for batch in batches_of(data, model):
            scored = _scores_and_labels(model, batch, forward)
            if scored is None or classes_of(*scored) is None:
                return None
            taken = inputs_taken(model, batch, forward)
            entropy = partial(_entropy_of_labels, classes=scored[0].size(1), taken=taken)
            return LossMeasure("cross-entropy", partial(_cross_entropies, forward=forward), entropy)
    return None


def own_loss(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    data: Sequence[Batch],
    forward: Forward = run_batch,
) -> LossMeasure | None:
    """Return the measure of the caller's loss, or the cross-entropy where there are labels; None with neither.

    Args:
        model: The model, which is left in eval mode.
        loss: loss(model, batch) -> scalar; None without a loss.
        data: The batches that are measured.
        forward: Calls the model on a batch, where the loss is the cross-entropy.
    """
    if loss is not None:
        return loss_measure(loss, len(data))
    with suppress(Exception):  # a forward that fails is reported where the data are observed
        return cross_entropy_measure(model.eval(), data, forward)
    return None


def score_measure(score: Score) -> LossMeasure:
    """Return the measure of a metric of one batch, with the sign with which lower is better."""

    def of_batch(model: nn.Module, batch: Batch) -> BatchLosses:
        value = -score.higher(score.on(model, [batch]))
        return BatchLosses([_number(value)], np.array([float(max(1, samples_in(batch)))]))

    return LossMeasure(score.name, of_batch)


def mean_loss(loss: Callable[[nn.Module, Any], Tensor]) -> Score:
    """Return the mean of a loss(model, batch) over samples as a metric where lower is better."""

    def metric(model: nn.Module, data: Iterable[Batch]) -> float:
        return loss_measure(loss, _MIN_VALUES).of(model, data).mean

    return Score(metric, lower_is_better=True, name="loss", errors=2.0)


def _entropy_of_labels(data: Iterable[Batch], classes: int, taken: int) -> float:
    """Return the mean cross-entropy of the best constant output, in nats.

    It is the entropy of the labels that count, times their share, because the loss of an ignored label is 0.
    """
    labels = torch.cat(
        [labels.flatten().to("cpu", torch.int64) for batch in data if (labels := labels_of(batch, taken)) is not None]
    )
    counts = torch.bincount(labels[(labels >= 0) & (labels < classes)]).to(torch.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum() * counts.sum() / len(labels))


def _scores_and_labels(model: nn.Module, batch: Batch, forward: Forward) -> tuple[Tensor, Tensor] | None:
    """Return the scores of a batch and the labels beside them, on one device; None without either."""
    labels = labels_of(batch, inputs_taken(model, batch, forward))
    scores = None if labels is None else scores_of(forward(model, batch))
    return None if labels is None or scores is None else (scores, labels.to(scores.device))


def _cross_entropies(model: nn.Module, batch: Batch, *, forward: Forward) -> BatchLosses:
    scored = _scores_and_labels(model, batch, forward)
    checked = None if scored is None else classes_and_fit(*scored, may_be_void=True)
    if scored is None or checked is None:
        raise _other_labels()
    classes, fits = checked
    values = widened(cross_entropies(scored[0], classes))
    return BatchLosses([values.reshape(len(values), -1).mean(1)], np.ones(len(values)), fits)


def _other_labels() -> UsageError:
    return UsageError("data: every batch must have labels like the first one, got a batch with other labels or none.")


def cross_entropies(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of each label, in nats, in float32 or wider.

    Args:
        scores: Logits of shape (N, K, ...).
        classes: Shape (N, ...), int64; `IGNORED` gives 0.
    """
    wide = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
    return cross_entropy(wide, classes, reduction="none", ignore_index=IGNORED)
