"""Finds the labels in a batch and the scores in the output of a classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnlab.observe.passes.batches import tensors_in

__all__ = ["are_scores_of", "labels_of", "scores_of"]

_LABEL_KEYS = ("labels", "label")
_LOGIT_KEYS = ("logits", "out")


def labels_of(batch: object) -> Tensor | None:
    """Return the labels of a batch: its second item, or its entry "labels" or "label"; None where there is none."""
    labels: object = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
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


def are_scores_of(scores: Tensor, labels: Tensor, *, ignored: int | None = None) -> bool:
    """Return whether the scores (N, K, ...) are those of K classes, and the labels (N, ...) integers from 0 to K - 1.

    Args:
        scores: The output of a model.
        labels: The labels of the same batch.
        ignored: A label below 0 that may stand for "no class".
    """
    if not scores.is_floating_point() or scores.dim() < 2 or scores.size(1) < 2:
        return False
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (scores.size(0), *scores.shape[2:]):
        return False
    classes = labels if ignored is None else labels[labels.to(torch.int64) != ignored]
    return not classes.numel() or bool((classes >= 0).all() and (classes < scores.size(1)).all())
