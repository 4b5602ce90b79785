"""Finds the labels in a batch and the scores in the output of a classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnlab.observe.passes.tensors import tensors_in

__all__ = ["IGNORED", "LABEL_KEYS", "classes_and_fit", "classes_of", "labels_of", "scores_of"]

IGNORED = -100
"""The label that torch's cross-entropy ignores."""

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""The keys, or the names of attributes, under which a batch holds its labels; the first one that is there counts."""

_LOGIT_KEYS = ("logits", "out")


def labels_of(batch: object, taken: int = 1) -> Tensor | None:
    """Return the labels of a batch, or None where there are none.

    They are the first item of a tuple or list behind its input, or what a dict or an object, such as a graph, holds
    under one of `LABEL_KEYS`. A named tuple without such a name is a tuple.

    Args:
        batch: A batch.
        taken: Number of items of a tuple or list that are input; 0 where it is not known, which counts as 1.
    """
    labels: object = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif not isinstance(batch, Tensor):
        labels = next((value for key in LABEL_KEYS if (value := getattr(batch, key, None)) is not None), None)
    if labels is None and isinstance(batch, (tuple, list)):
        labels = next(iter(batch[max(1, taken) :]), None)
    return labels if isinstance(labels, Tensor) and labels.dim() else None


def scores_of(output: object) -> Tensor | None:
    """Return the scores in the output of a model, or None.

    They are the entry "logits" or "out" of a mapping (or else its first tensor), the attribute `logits`, the first item
    of a tuple or list, or the output itself.
    """
    if isinstance(output, Mapping):
        named = next((output[key] for key in _LOGIT_KEYS if isinstance(output.get(key), Tensor)), None)
        return named if named is not None else next(iter(tensors_in(output)), None)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)):
        return scores_of(output[0]) if output else None
    return next(iter(tensors_in(output)), None)


def classes_of(scores: Tensor, labels: Tensor, *, may_be_void: bool = False) -> Tensor | None:
    """Return the labels (N, ...) as int64 if the scores (N, K, ...) are those of K classes; None if they are not.

    One value outside 0..K-1, such as -100, -1 or 255, may stand for "no class", and becomes `IGNORED`. None is returned
    where the class axis is ambiguous, as for scores of shape (N, L, L) with labels of shape (N, L).

    Args:
        scores: The output of a model.
        labels: The labels of the same batch.
        may_be_void: Whether a batch may have no class at all.
    """
    checked = classes_and_fit(scores, labels, may_be_void=may_be_void)
    return checked[0] if checked is not None and bool(checked[1]) else None


def classes_and_fit(scores: Tensor, labels: Tensor, *, may_be_void: bool) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`classes_of` returns, and whether it may be used: a bool of shape () on the same device.

    None stands for a shape or dtype that does not fit. Nothing waits for the device.
    """
    if not scores.is_floating_point() or scores.dim() < 2 or scores.size(1) < 2:
        return None
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (scores.size(0), *scores.shape[2:]):
        return None
    if labels.dim() > 1 and scores.shape[1:-1] == labels.shape[1:]:
        return None
    classes = labels.to(torch.int64)
    is_class = (classes >= 0) & (classes < scores.size(1))
    fits = is_class.new_ones(())
    if labels.numel():
        limits = torch.iinfo(torch.int64)
        others_are_alike = (
            classes.masked_fill(is_class, limits.min).max() <= classes.masked_fill(is_class, limits.max).min()
        )
        fits = others_are_alike if may_be_void else others_are_alike & is_class.any()
    return torch.where(is_class, classes, IGNORED), fits
