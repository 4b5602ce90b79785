"""Regroups the samples of batches into larger batches, where their shapes allow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bnlab.observe.passes.batches import columns_of, samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import KeptBatches
from bnlab.observe.passes.tensors import with_tensors

__all__ = ["regrouped"]


def regrouped(data: KeptBatches, samples: int) -> KeptBatches | None:
    """Return the held batches joined into batches of at least so many samples; None where their shapes do not allow it.

    Neighbouring batches are joined. A rest with fewer samples goes to the last batch.

    Args:
        data: Batches. Every tensor with dimensions must have the samples as its first dimension.
        samples: Samples in each new batch. The data may have fewer in all: they become one batch.
    """
    groups: list[list[Batch]] = [[]]
    size = 0
    for batch in data:
        if size >= samples:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += samples_in(batch)
    if len(groups) > 1 and size < samples:
        rest = groups.pop()
        groups[-1] += rest
    joined = [_joined(group) for group in groups if group]
    if not joined or any(batch is None for batch in joined):
        return None
    return KeptBatches(dict(enumerate(joined)), joined, len(joined), uses_all=False)


def _joined(batches: Sequence[Batch]) -> Batch | None:
    """Return one batch with the samples of several; None where their tensors do not fit together."""
    if len(batches) == 1:
        return batches[0]
    columns = columns_of(batches, [samples_in(batch) for batch in batches])
    return with_tensors(batches[0], map(torch.cat, columns)) if columns else None
