"""Shows whether a loader is sorted by class, so that the batches so far leave classes out."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.observe.labels import labels_of
from bnlab.observe.passes.calling import Batch
from bnlab.observe.transfers import to_host

__all__ = ["LabelOrder"]


class LabelOrder:
    """Whether the labels of all batches so far are in ascending or descending order, as in data sorted by class.

    Only whole numbers count, one for each sample. Labels on a device are read when they are needed.
    """

    def __init__(self) -> None:
        self._ends: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """Take the labels of a batch, if it has some."""
        labels = labels_of(batch)
        if labels is None or labels.is_floating_point() or labels.is_complex() or labels.numel() != labels.size(0):
            return
        flat = labels.detach().reshape(-1).to(torch.int64)
        if flat.numel():
            steps = flat.diff(prepend=flat[:1])
            self._ends.append(torch.stack([flat[0], flat[-1], steps.min(), steps.max()]))

    def clue(self, *, is_everything: bool) -> str | None:
        """Return what shows that the data are sorted, as a clause; None where the labels are mixed, or do not show it.

        Args:
            is_everything: Whether the data have ended. Labels that are all the same show an order only before that.
        """
        if len(self._ends) < 2:
            return None
        self._ends = to_host(self._ends)
        first, last, down, up = torch.stack(self._ends).numpy().T
        between = first[1:] - last[:-1]
        is_ascending = bool((down >= 0).all() & (between >= 0).all())
        is_descending = bool((up <= 0).all() & (between <= 0).all())
        if is_ascending and is_descending:
            return None if is_everything else "all labels so far are the same"
        return "the labels are sorted" if is_ascending or is_descending else None
