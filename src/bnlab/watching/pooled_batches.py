"""Pools the statistics of micro-batches exactly, without waiting for a device."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.functional.streaming import merged_moments
from bnlab.nn.running_update import BatchStatistics, is_readable

__all__ = ["Block", "CompiledPool", "Pool", "Pooled", "Rule", "merged"]

_MAX_BLOCKS = 32
"""Number of micro-batches whose statistics wait before they become one."""


class Block(NamedTuple):
    """The moments of some values.

    Attributes:
        count: Number of values per channel, or the sum of their weights; a tensor of shape () where a device knows it.
        mean: Their mean. Shape (C,), float64, or float32 on a device without float64.
        m2: The sum of their squared deviations from the mean. Shape and dtype of `mean`.
    """

    count: float | Tensor  # type: ignore[assignment] # hides tuple.count, which nobody calls on a block
    mean: Tensor
    m2: Tensor

    @property
    def statistics(self) -> BatchStatistics:
        """The statistics of a batch with these moments."""
        at_least_one = self.count.clamp(min=1) if isinstance(self.count, Tensor) else max(self.count, 1.0)
        return BatchStatistics(self.mean, self.m2 / at_least_one, self.count)  # type: ignore[arg-type]


class Pooled(NamedTuple):
    """What the micro-batches of a step come to.

    Attributes:
        block: The moments of those that count; None where the host knows that there are none.
        rejected: Number of micro-batches that do not count; a tensor of shape () where only a device knows.
    """

    block: Block | None
    rejected: int | Tensor


class Rule(NamedTuple):
    """Which micro-batches count.

    Attributes:
        fewest: The smallest number of values per channel.
        keeps_nonfinite: Whether one with an inf or NaN counts.
    """

    fewest: int = 2
    keeps_nonfinite: bool = False

    def accepts(self, count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
        """Return whether a micro-batch counts: a bool tensor of shape ()."""
        enough = count >= self.fewest
        return enough if self.keeps_nonfinite else enough & (mean + m2).isfinite().all()


def merged(blocks: list[Block]) -> Block:
    """Return the moments of all blocks together, on the device of the last one."""
    device = blocks[-1].mean.device
    return reduce(_together, (_on(block, device) for block in blocks))


class Pool:
    """The statistics of the micro-batches since the last step, which code outside of a compiler adds.

    Attributes:
        batches: Number of micro-batches, with those that do not count.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._blocks: list[Block] = []
        self._rejected: int | Tensor = 0
        self.batches = 0

    @torch.no_grad()
    def add(self, mean: Tensor, var: Tensor, count: float | Tensor) -> None:
        """Add a micro-batch: its mean and biased variance of shape (C,), and its number of values per channel."""
        self.batches += 1
        m2 = var * count
        number = count if isinstance(count, Tensor) else mean.new_full((), count)
        counts = self._rule.accepts(number, mean, m2)
        if not is_readable(mean):
            self._rejected = self._rejected + ~counts
            self._append(Block(*(torch.where(counts, value, 0) for value in (number, mean, m2))))
        elif counts:
            self._append(Block(float(count), mean, m2))
        else:
            self._rejected += 1

    def take(self) -> Pooled:
        """Return what the micro-batches come to, and begin anew."""
        block = merged(self._blocks) if self._blocks else None
        pooled = Pooled(block, self._rejected)
        self._blocks, self._rejected, self.batches = [], 0, 0
        return pooled

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        if len(self._blocks) == _MAX_BLOCKS:
            self._blocks = [merged(self._blocks)]


class CompiledPool:
    """The statistics of the micro-batches since the last step, which compiled code adds to tensors in place.

    Args:
        rule: Which micro-batches count.
        like: Shape (C,), on the device of the layer.

    Attributes:
        is_used: Whether compiled code adds to it.
    """

    def __init__(self, rule: Rule, like: Tensor) -> None:
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self._rule = rule
        self._count = torch.zeros(
            1, dtype=dtype, device=like.device
        )  # torch 2.13 drops a change of a float of shape ()
        self._mean = torch.zeros(like.shape, dtype=dtype, device=like.device)
        self._m2 = torch.zeros_like(self._mean)
        self._rejected = torch.zeros((), dtype=torch.long, device=like.device)
        self._batches = torch.zeros_like(self._rejected)
        self.is_used = False

    @torch.no_grad()
    def add(self, mean: Tensor, m2: Tensor, count: Tensor, is_new: Tensor) -> None:
        """Add a micro-batch where a bool tensor of shape () says so.

        Its mean and m2 have shape (C,), and its number of values per channel has shape ().
        """
        self.is_used = True
        counts = is_new & self._rule.accepts(count, mean, m2)
        more = (torch.where(counts, value, 0) for value in (count, mean, m2))
        together = merged_moments(self._count, self._mean, self._m2, *more)
        for total, value in zip((self._count, self._mean, self._m2), together, strict=True):
            total.copy_(value)
        self._rejected.add_(is_new & ~counts)
        self._batches.add_(is_new)

    @torch.no_grad()
    def take(self) -> tuple[Pooled, int | Tensor]:
        """Return what the micro-batches come to and their number, and begin anew."""
        totals = [self._count, self._mean, self._m2, self._rejected, self._batches]
        count, mean, m2, rejected, batches = (total.clone() for total in totals)
        for total in totals:
            total.zero_()
        if not is_readable(mean):
            return Pooled(Block(count.squeeze(0), mean, m2), rejected), batches
        block = Block(float(count), mean, m2) if count else None
        return Pooled(block, int(rejected)), int(batches)


def _together(a: Block, b: Block) -> Block:
    counts: Any = (a.count, b.count)  # one may be a number and the other a tensor
    return Block(*merged_moments(counts[0], a.mean, a.m2, counts[1], b.mean, b.m2))


def _on(block: Block, device: torch.device) -> Block:
    count = block.count.to(device) if isinstance(block.count, Tensor) else block.count
    return Block(count, block.mean.to(device), block.m2.to(device))
