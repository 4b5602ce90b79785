"""The metrics that have a name: accuracy, loss and miou, on batches with labels.

A name may end in ":" and the label that means "no class", as in "miou:0". Without it, the labels -100 and 255 mean no
class: torch's cross_entropy ignores the first one, and Pascal VOC, Cityscapes and ADE20K mark unlabelled pixels with
the second one. Any other label outside 0..K-1 is an error, because it may come from labels that count from 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.observe.labels import IGNORED, LABEL_KEYS, labels_of, scores_of
from bnlab.observe.losses import cross_entropies
from bnlab.observe.metric import Metric, Score, metric_name
from bnlab.observe.passes.calling import Batch, Forward, inputs_taken, run_batch
from bnlab.observe.passes.kept_batches import require_data
from bnlab.observe.passes.placement import batches_of
from bnlab.wording import did_you_mean

__all__ = ["NAMES", "accuracy", "cross_entropy", "is_metric_name", "miou", "named_metric", "score_of"]

_NO_CLASS = (IGNORED, 255)
"""The labels that mean no class if the caller names none. 255 is a class where there are more than 255."""

_SPEC = re.compile(r"(?P<name>\w+)(:(?P<ignored>-?\d+))?")


@torch.no_grad()
def accuracy(
    model: nn.Module, data: Iterable[Any], *, ignore_index: int | None = None, forward: Forward = run_batch
) -> float:
    """Return the share of right answers, 0 to 1. Every sample has the same weight, whatever the batch sizes are.

    A sample whose scores hold a NaN counts as wrong. A sample with many labels (segmentation) counts by its share of
    right answers.

    Args:
        model: A model that returns scores (N, K, ...) with K >= 2: a tensor, the first item of a tuple, the entry
            "logits" or "out" of a dict (or else its first tensor), or an attribute `logits`. Its mode does not change.
        data: Batches that the model takes, with labels: the second item of a tuple or list, or the entry or attribute
            "labels", "label", "targets", "target" or "y". Labels are integers in 0..K-1 of shape (N, ...). Batches are
            moved to the device of the model.
        ignore_index: The label that means no class and is left out. With None, these are -100 and 255.
        forward: forward(model, batch) -> output, for a model that cannot be called on a batch directly.

    Raises:
        UsageError: If data is empty or can be run through only once, a batch has no labels, a label is not a class, or
            shapes do not fit.

    Example:
        >>> from torch import nn, tensor
        >>> accuracy(nn.Identity(), [(tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([1, 0]))])
        0.5
    """
    return _mean_over_samples("accuracy", _share_right, _labelled("accuracy", model, data, ignore_index, forward))


@torch.no_grad()
def cross_entropy(
    model: nn.Module, data: Iterable[Any], *, ignore_index: int | None = None, forward: Forward = run_batch
) -> float:
    """Return the mean cross-entropy in nats, which is the metric "loss": lower is better, and a NaN score gives nan.

    Every sample has the same weight, whatever the batch sizes are. A sample with many labels counts by their mean.

    Args:
        model: As for `accuracy`. Its scores are logits.
        data: As for `accuracy`.
        ignore_index: As for `accuracy`.
        forward: As for `accuracy`.

    Raises:
        UsageError: As for `accuracy`.

    Example:
        >>> from torch import nn, tensor
        >>> round(cross_entropy(nn.Identity(), [(tensor([[0.0, 0.0]]), tensor([1]))]), 4)
        0.6931
    """
    return _mean_over_samples("loss", cross_entropies, _labelled("loss", model, data, ignore_index, forward))


@torch.no_grad()
def miou(
    model: nn.Module, data: Iterable[Any], *, ignore_index: int | None = None, forward: Forward = run_batch
) -> float:
    """Return the mean intersection over union, 0 to 1: the mean over classes of TP / (TP + FP + FN).

    The counts of each class come from the whole data set. A class that neither the labels nor the answers contain has
    no weight. A position whose scores hold a NaN has no answer: it counts as missed.

    Args:
        model: As for `accuracy`. Segmentation scores have the shape (N, K, *spatial).
        data: As for `accuracy`. The labels of a segmentation have the shape (N, *spatial).
        ignore_index: As for `accuracy`. If it is one of 0..K-1, the mean leaves that class out.
        forward: As for `accuracy`.

    Raises:
        UsageError: As for `accuracy`, or if the number of classes changes from batch to batch.

    Source:
        Everingham et al. 2015, The Pascal Visual Object Classes Challenge: A Retrospective, section 3.4
        (https://doi.org/10.1007/s11263-014-0733-5).

    Example:
        >>> from torch import nn, tensor
        >>> scores = tensor([[[0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 0.0]]])  # one sample, two classes, four positions
        >>> round(miou(nn.Identity(), [(scores, tensor([[1, 1, 0, 0]]))]), 4)  # (1/2 + 2/3) / 2
        0.5833
    """
    hits = union = None
    for scores, labels in _labelled("miou", model, data, ignore_index, forward):
        classes = scores.size(1)
        if hits is None or union is None:
            hits, union = torch.zeros(2, classes, dtype=torch.int64)
        if len(hits) != classes:
            raise UsageError(f"miou: model must return the same number of classes, got {len(hits)} and {classes}.")
        answers = scores.argmax(1).masked_fill(scores.isnan().any(1), classes)
        counts = labels != IGNORED
        answers, labels = answers[counts].cpu(), labels[counts].cpu()  # counting on a GPU is not deterministic
        right = torch.bincount(labels[answers == labels], minlength=classes)
        hits += right
        union += torch.bincount(labels, minlength=classes)
        union += torch.bincount(answers, minlength=classes)[:classes] - right
    if hits is None or union is None:
        raise _no_labels("miou")
    if ignore_index is not None and 0 <= ignore_index < len(union):
        union[ignore_index] = 0
    seen = union > 0
    if not bool(seen.any()):
        raise _no_labels("miou")
    return float((hits[seen].to(torch.float64) / union[seen]).mean())


for _function in (accuracy, cross_entropy, miou):
    _function.takes_forward = True  # type: ignore[attr-defined]  # `score_of` passes that of the caller

_METRICS: Mapping[str, tuple[Callable[..., float], bool]] = {
    "accuracy": (accuracy, True),
    "loss": (cross_entropy, False),
    "miou": (miou, True),
}
"""The functions of the metrics, and whether a higher value is better."""

NAMES = tuple(_METRICS)
"""The names of all metrics."""


@dataclass(frozen=True)
class NamedMetric:
    """A metric with a name, called as metric(model, data) -> float.

    Attributes:
        name: One of `NAMES`.
        ignore_index: The label that means no class; None for -100 and 255.
    """

    takes_forward: ClassVar[bool] = True

    name: str
    ignore_index: int | None = None

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better."""
        return _METRICS[self.name][1]

    def __call__(self, model: nn.Module, data: Iterable[Any], *, forward: Forward = run_batch) -> float:
        """Measure a model, in the mode in which it is."""
        return _METRICS[self.name][0](model, data, ignore_index=self.ignore_index, forward=forward)


def is_metric_name(text: str) -> bool:
    """Return whether a text is one of `NAMES`, alone or with ":" and the label that means no class."""
    match = _SPEC.fullmatch(text)
    return match is not None and match["name"] in NAMES


def named_metric(text: str) -> NamedMetric:
    """Return the metric of a name.

    Args:
        text: One of `NAMES`, alone or with ":" and the label that means no class, as in "miou:255".

    Raises:
        UsageError: If there is no metric of this name.
    """
    match = _SPEC.fullmatch(text)
    if match is None or match["name"] not in NAMES:
        raise UsageError(
            f"metric: value must be a function of model and data, or one of {', '.join(NAMES)}, alone or with an "
            f"ignored label as in 'miou:255', got {text!r}.{did_you_mean(text.partition(':')[0], NAMES)}"
        )
    return NamedMetric(match["name"], None if match["ignored"] is None else int(match["ignored"]))


def score_of(metric: Metric | str, *, lower_is_better: bool = False, forward: Forward = run_batch) -> Score:
    """Return a metric with its direction.

    Args:
        metric: metric(model, data) -> float, or the name of a metric. An attribute `higher_is_better` that is False, as
            that of torchmetrics, says that lower is better.
        lower_is_better: Whether the caller says that a lower value is better.
        forward: forward(model, batch) -> output, through which a metric with a name calls the model.

    Raises:
        UsageError: If there is no metric of this name, or if it is one of which a higher value is better and the caller
            says the opposite.
    """
    measure: Callable[..., float] = named_metric(metric) if isinstance(metric, str) else metric
    is_higher_better: bool | None = getattr(measure, "higher_is_better", None)
    name = metric_name(measure)
    if isinstance(measure, NamedMetric):
        name = measure.name
        if lower_is_better and is_higher_better:
            raise UsageError(
                f"metric: lower_is_better must be False for {name}, got True. Leave out lower_is_better=True, or "
                "--minimize on the command line."
            )
    inner = measure.func if isinstance(measure, partial) else measure  # as in partial(accuracy, ignore_index=0)
    if getattr(inner, "takes_forward", False):
        measure = partial(measure, forward=forward)
    return Score(measure, lower_is_better or is_higher_better is False, name)


def _share_right(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(1) == labels) & ~scores.isnan().any(1)


def _mean_over_samples(
    name: str, values: Callable[[Tensor, Tensor], Tensor], batches: Iterator[tuple[Tensor, Tensor]]
) -> float:
    """Return the mean over samples of the mean over the labels of a sample that count.

    Args:
        name: Name of the metric in error messages.
        values: Returns the value at each label, shape (N, ...), and 0 where it is `IGNORED`.
        batches: Scores and labels.
    """
    total, samples = 0.0, 0
    for scores, labels in batches:
        if labels.numel():
            each = values(scores, labels).cpu().to(torch.float64)  # on the CPU: some devices have no float64
            sums = each.reshape(len(labels), -1).sum(1)
            counts = (labels != IGNORED).reshape(len(labels), -1).sum(1).cpu()
            total += float((sums[counts > 0] / counts[counts > 0]).sum())
            samples += int((counts > 0).sum())
    if not samples:
        raise _no_labels(name)
    return total / samples


def _no_labels(name: str) -> UsageError:
    return UsageError(f"{name}: data must hold at least one labelled sample, got none.")


def _labelled(
    name: str, model: nn.Module, data: Iterable[Any], ignore_index: int | None, forward: Forward
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scores (N, K, ...) of every batch, and its labels (N, ...), int64, `IGNORED` where they mean no class.

    Raises:
        UsageError: If the scores or the labels do not fit.
    """
    for index, batch in enumerate(batches_of(require_data("data", data), model)):
        labels = labels_of(batch, inputs_taken(model, batch, forward))
        if labels is None:
            raise UsageError(
                f"{name}: batches must be (input, label, ...) with a tensor of labels, or have one of the keys "
                f"{', '.join(LABEL_KEYS)}, got {_kind(batch)} as batch {index}. Pass a function "
                "metric(model, data) -> float for other batches."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise UsageError(f"{name}: labels must be integers, one class each, got {labels.dtype} in batch {index}.")
        output = forward(model, batch)
        scores = scores_of(output)
        if scores is None:
            raise UsageError(
                f"{name}: model must return a tensor of scores, got {_kind(output)}. Pass a function "
                "metric(model, data) -> float for other outputs."
            )
        _require_fit(name, index, scores, labels)
        yield scores, _classes(name, index, labels.to(scores.device, torch.int64), scores.size(1), ignore_index)


def _require_fit(name: str, index: int, scores: Tensor, labels: Tensor) -> None:
    shape = tuple(scores.shape)
    if not scores.is_floating_point() or len(shape) < 2 or shape[1] < 2:
        raise UsageError(
            f"{name}: model must return floating scores of shape (N, K, ...) with at least 2 classes K, "
            f"got {scores.dtype} of {shape}."
        )
    if tuple(labels.shape) != (shape[0], *shape[2:]):
        raise UsageError(
            f"{name}: labels must have the shape {(shape[0], *shape[2:])} for outputs of {shape}, "
            f"got {tuple(labels.shape)} in batch {index}."
        )


def _classes(name: str, index: int, labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Return the labels with `IGNORED` in place of those that mean no class.

    Raises:
        UsageError: If another label is not one of 0..K-1.
    """
    values = _NO_CLASS if ignore_index is None else (ignore_index,)
    no_class = [value for value in values if ignore_index is not None or value not in range(classes)]
    ignored = torch.isin(labels, torch.tensor(no_class, dtype=torch.int64, device=labels.device))
    wrong = labels[~ignored & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        label = int(wrong[0])
        raise UsageError(
            f"{name}: labels must be from 0 to {classes - 1}, got {label} in batch {index}. "
            f"Pass metric='{name}:{label}' if {label} means no class."
        )
    return labels.masked_fill(ignored, IGNORED)


def _kind(value: Batch) -> str:
    if isinstance(value, Tensor):
        return "a tensor alone"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__
