"""Merges the pooled statistics of the ranks for layers of torch.nn.SyncBatchNorm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.modules.batchnorm import SyncBatchNorm

from bnlab.watching.pooled_batches import Block, merged

__all__ = ["merged_over_ranks"]


@torch.no_grad()
def merged_over_ranks(layers: Sequence[tuple[SyncBatchNorm, Block | None]]) -> list[Block | None]:
    """Return the moments of each layer over all ranks of its process group, the same on every rank.

    All ranks must call this with the same layers, also with those that have not run. Each process group exchanges one
    tensor.

    Args:
        layers: The layers, with the moments on this rank; None for a layer without any.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [block for _, block in layers]
    groups: dict[Any, list[int]] = {}
    for index, (layer, _) in enumerate(layers):
        groups.setdefault(layer.process_group or distributed.group.WORLD, []).append(index)
    merged = [block for _, block in layers]
    for group, indices in groups.items():
        if distributed.get_world_size(group) > 1:
            for index, block in zip(indices, _exchanged([layers[index] for index in indices], group), strict=True):
                merged[index] = block
    return merged


def _exchanged(layers: Sequence[tuple[SyncBatchNorm, Block | None]], group: Any) -> Iterator[Block]:  # noqa: ANN401
    own = torch.cat([_flat(layer, block) for layer, block in layers])
    of_ranks = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(of_ranks, own, group=group)
    sizes = [size for layer, _ in layers for size in (1, layer.num_features, layer.num_features)]
    parts = [iter(torch.split(flat, sizes)) for flat in of_ranks]
    for _ in layers:
        blocks = [Block(next(part)[0], next(part), next(part)) for part in parts]
        yield merged(blocks)


def _flat(layer: SyncBatchNorm, block: Block | None) -> Tensor:
    """Return count, mean and m2 of a layer in one tensor of shape (1 + 2 C,), float64, on the device of the layer."""
    mean = layer.running_mean
    assert mean is not None  # only layers with running statistics are deferred
    flat = torch.zeros(1 + 2 * layer.num_features, dtype=torch.float64, device=mean.device)
    if block is not None:
        flat[0] = block.count
        flat[1 : 1 + layer.num_features] = block.mean
        flat[1 + layer.num_features :] = block.m2
    return flat
