"""Metrics of a classifier on labelled batches. Each is one number, and higher is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.observe.labels import labels_of, scores_of
from bnlab.observe.losses import cross_entropies
from bnlab.observe.passes.batches import batches_of, require_data, run_batch

__all__ = ["NAMES", "Metric", "accuracy", "load", "loss"]

Metric = Callable[[nn.Module, Iterable[Any]], float]
"""metric(model, data) -> float, higher is better."""


@torch.no_grad()
def accuracy(model: nn.Module, data: Iterable[Any]) -> float:
    """Return the share of right answers, 0 to 1. Every sample has the same weight, whatever the batch sizes are.

    A sample whose scores hold a NaN counts as wrong. A sample with many labels (segmentation) counts by its share of
    right answers.

    Args:
        model: A model that returns scores (N, C, ...) with C >= 2: a tensor, the first item of a tuple, the entry
            "logits" or "out" of a dict (or else its first tensor), or an attribute `logits`. Its mode does not change.
        data: Batches (input, label, ...), or dicts with the key "labels" or "label", which are passed as keywords.
            Labels are integers in 0..C-1 of shape (N, ...). Batches are moved to the device of the model.

    Raises:
        UsageError: If data is empty or can be run through only once, a batch has no labels, or shapes do not fit.

    Example:
        >>> from torch import nn, tensor
        >>> accuracy(nn.Identity(), [(tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([1, 0]))])
        0.5
    """
    return _mean_over_samples("accuracy", _share_right, model, data)


@torch.no_grad()
def loss(model: nn.Module, data: Iterable[Any]) -> float:
    """Return minus the mean cross-entropy in nats: at most 0, and higher is better. It is nan if a score is nan.

    Every sample has the same weight, whatever the batch sizes are.

    Args:
        model: As for `accuracy`. Its scores are logits.
        data: As for `accuracy`.

    Raises:
        UsageError: As for `accuracy`.

    Example:
        >>> from torch import nn, tensor
        >>> round(loss(nn.Identity(), [(tensor([[0.0, 0.0]]), tensor([1]))]), 4)
        -0.6931
    """
    return _mean_over_samples("loss", _minus_cross_entropy, model, data)


loss.higher_is_better = True  # type: ignore[attr-defined]  # its name says the opposite

_METRICS: dict[str, Metric] = {"accuracy": accuracy, "loss": loss}

NAMES = tuple(_METRICS)
"""The names of all metrics."""


def load(name: str) -> Metric:
    """Return the metric of a name in `NAMES`.

    Raises:
        UsageError: If there is no metric of this name.
    """
    if name not in _METRICS:
        raise UsageError(f"metrics: name must be {' or '.join(NAMES)}, got {name!r}.")
    return _METRICS[name]


def _share_right(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(1) == labels) & ~scores.isnan().any(1)


def _minus_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return -cross_entropies(scores, labels)


def _mean_over_samples(
    name: str, values: Callable[[Tensor, Tensor], Tensor], model: nn.Module, data: Iterable[Any]
) -> float:
    require_data("data", data)
    total, samples = 0.0, 0
    for scores, labels in _scores_and_labels(name, model, data):
        if len(labels):
            each = values(scores, labels).cpu().to(torch.float64)  # on the CPU: some devices have no float64
            total += float(each.reshape(len(labels), -1).mean(1).sum())
            samples += len(labels)
    if not samples:
        raise UsageError(f"{name}: data must hold at least one labelled sample, got none.")
    return total / samples


def _scores_and_labels(name: str, model: nn.Module, data: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scores and labels of every batch, on one device and with matching shapes."""
    for index, batch in enumerate(batches_of(data, model)):
        labels = labels_of(batch)
        if labels is None:
            raise UsageError(
                f"{name}: batches must be (input, label, ...) with a tensor of labels, "
                f"got {_kind(batch)} as batch {index}."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise UsageError(f"{name}: labels must be integers, one class each, got {labels.dtype} in batch {index}.")
        output = run_batch(model, batch)
        scores = scores_of(output)
        if scores is None:
            raise UsageError(f"{name}: model must return a tensor of scores, got {_kind(output)}.")
        _require_fit(name, index, scores, labels)
        yield scores, labels.to(scores.device, torch.int64)


def _require_fit(name: str, index: int, scores: Tensor, labels: Tensor) -> None:
    shape = tuple(scores.shape)
    if not scores.is_floating_point() or len(shape) < 2 or shape[1] < 2:
        raise UsageError(
            f"{name}: model must return floating scores of shape (N, C, ...) with at least 2 classes C, "
            f"got {scores.dtype} of {shape}."
        )
    if tuple(labels.shape) != (shape[0], *shape[2:]):
        raise UsageError(
            f"{name}: labels must have the shape {(shape[0], *shape[2:])} for outputs of {shape}, "
            f"got {tuple(labels.shape)} in batch {index}."
        )
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= shape[1]:
            raise UsageError(
                f"{name}: labels must be from 0 to {shape[1] - 1}, got {low if low < 0 else high} in batch {index}."
            )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return "a tensor alone"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__
