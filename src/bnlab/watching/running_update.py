"""Moves the running statistics of a layer once, by everything that a step has used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.functional.running import moving_average
from bnlab.nn.base import BatchNormBase
from bnlab.nn.running_update import BatchStatistics
from bnlab.watching.pooled_batches import Pooled

__all__ = ["move_running_statistics"]


@torch.no_grad()
def move_running_statistics(layer: _BatchNorm, pooled: Pooled, skipped: bool | Tensor = False) -> None:
    """Move the running statistics of a layer by the micro-batches of a step, as one batch does, and count one batch.

    A layer of bnlab counts the micro-batches that were rejected in `skipped_batches`.

    Args:
        layer: A layer with running statistics.
        pooled: What the micro-batches come to.
        skipped: Whether the step was skipped, so that nothing may change: a tensor of shape () where only a device
            knows.
    """
    own = _counters_and_buffers(layer)
    before = [tensor.clone() for tensor in own] if isinstance(skipped, Tensor) else []
    if isinstance(layer, BatchNormBase):
        _move_own(layer, pooled)
    elif pooled.block is not None:
        _move_as_torch(layer, pooled.block.statistics)
    if isinstance(skipped, Tensor):
        for tensor, old in zip(own, before, strict=True):
            tensor.copy_(torch.where(skipped.to(tensor.device), old, tensor))


def _counters_and_buffers(layer: _BatchNorm) -> list[Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked", "skipped_batches")
    tensors = (getattr(layer, name, None) for name in names)
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _move_own(layer: BatchNormBase, pooled: Pooled) -> None:
    """Let a layer of bnlab update itself. It counts a batch without values as skipped, which is one too many."""
    block, rejected = pooled
    if block is not None:
        layer._update(block.statistics)  # noqa: SLF001 - what the layer itself calls for a batch
        if isinstance(block.count, Tensor):
            rejected = rejected - (block.count < 2).long()
    device = layer.skipped_batches.device if block is None else block.mean.device
    layer._count_skipped(device, rejected)  # noqa: SLF001


def _move_as_torch(layer: _BatchNorm, batch: BatchStatistics) -> None:
    """Do what a layer of torch does with a batch, unless the batch has fewer than two values per channel."""
    running_mean, running_var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if running_mean is None or running_var is None or (tracked is None and layer.momentum is None):
        return
    count = batch.count
    counts = count >= 2
    if counts is False:
        return
    if tracked is not None:
        tracked.add_(counts)
    updates = 1 if tracked is None else tracked.clamp(min=1)
    above_one = (count - 1).clamp(min=1) if isinstance(count, Tensor) else count - 1
    for running, new in ((running_mean, batch.mean), (running_var, batch.var * (count / above_one))):
        updated = moving_average(running, new, layer.momentum, updates)
        running.copy_(torch.where(counts, updated, running) if isinstance(counts, Tensor) else updated)
