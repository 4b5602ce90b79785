"""Sets `num_batches_tracked` after a recalibration, so that the age of the statistics can be read from it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError

__all__ = ["WrittenCounters", "settled_count", "write_counters"]

_INITIAL_WEIGHT = 0.01
"""Weight of the initial values below which a moving average counts as settled: the limit of BN105."""


@dataclass(frozen=True)
class WrittenCounters:
    """The counters that were written.

    Attributes:
        require_unchanged: A function that raises an error if a counter has changed since.
        restore: A function that restores the old values.
        old: The old value of each counter that changed, by layer path.
        new: The value that all counters have now.
    """

    require_unchanged: Callable[[], None]
    restore: Callable[[], None]
    old: Mapping[str, int]
    new: int


def settled_count(layers: Iterable[_BatchNorm], batches: int) -> int:
    """Return the number of updates after which the initial values of every layer count as forgotten.

    Args:
        layers: The recalibrated layers. With momentum a, the number is ceil(ln 0.01 / ln(1 - a)); with momentum None it
            is `batches`.
        batches: The batches that the statistics come from.
    """
    counts = [0]
    for layer in layers:
        if layer.momentum is None:
            counts.append(batches)
        elif layer.momentum >= 1:
            counts.append(1)
        elif layer.momentum > 0:
            counts.append(math.ceil(math.log(_INITIAL_WEIGHT) / math.log1p(-layer.momentum)))
    return max(counts)


@torch.no_grad()
def write_counters(layers: Mapping[str, _BatchNorm], count: int) -> WrittenCounters:
    """Set the counters of all layers to one number, at least `count` and at least the largest of them.

    One number for all keeps counters from contradicting each other (BN112). A layer without a counter is left alone.

    Args:
        layers: Every BN layer of the network, by path.
        count: The smallest number to write.
    """
    counters = {
        path: counter for path, layer in layers.items() if isinstance(counter := layer.num_batches_tracked, Tensor)
    }
    old = {path: counter.detach().clone() for path, counter in counters.items()}
    new = max([count, *(int(value) for value in old.values())])
    changed = {path: int(value) for path, value in old.items() if int(value) != new}

    def require_unchanged() -> None:
        for path in changed:
            if int(counters[path]) != new:
                raise UsageError(
                    f"undo: num_batches_tracked of {path or 'the model'} must still be {new}, "
                    f"got {int(counters[path])}. Undo the later changes first."
                )

    def restore() -> None:
        with torch.no_grad():
            for path in changed:
                counters[path].copy_(old[path])

    try:
        for path in changed:
            counters[path].fill_(new)
    except BaseException:
        restore()
        raise
    return WrittenCounters(require_unchanged, restore, changed, new)
