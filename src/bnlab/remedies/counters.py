"""Sets `num_batches_tracked` after a recalibration, so that the age of the statistics can be read from it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.conventions import SETTLED_WEIGHT
from bnlab.errors import UsageError
from bnlab.observe.transfers import to_host

__all__ = ["WrittenCounters", "new_counters", "settled_count", "write_counters"]

_LARGEST = 10**9
"""Largest number of updates that is written, for a momentum so small that no training settles."""


@dataclass(frozen=True)
class WrittenCounters:
    """The counters that were written.

    Attributes:
        require_unchanged: A function that raises an error if a counter has changed since.
        restore: A function that restores the old values.
        changes: The old and the new value of each counter that changed, by layer path.
    """

    require_unchanged: Callable[[], None]
    restore: Callable[[], None]
    changes: Mapping[str, tuple[int, int]]


def settled_count(layers: Iterable[_BatchNorm]) -> int:
    """Return the number of updates after which the initial values of every layer count as forgotten.

    With momentum a, it is the smallest k with (1 - a)^k <= 0.01. Layers with momentum 0 or None count for nothing.
    """
    counts = [0]
    for layer in layers:
        if layer.momentum is not None and layer.momentum >= 1:
            counts.append(1)
        elif layer.momentum:
            exact = math.log(SETTLED_WEIGHT) / math.log1p(-layer.momentum)
            count = math.ceil(min(exact, _LARGEST))
            counts.append(count if (1 - layer.momentum) ** count <= SETTLED_WEIGHT else count + 1)
    return min(max(counts), _LARGEST)


def new_counters(layers: Mapping[str, _BatchNorm], recalibrated: Collection[str], batches: int) -> dict[str, int]:
    """Return what the counters of layers become after some of them were recalibrated.

    A moving average gets one number for all layers, so that counters do not contradict each other (BN112): the largest
    counter, or that of a settled average if it is larger. A recalibrated cumulative average (momentum None) gets the
    number of batches, and another one keeps its own. A layer without a counter is left out.

    Args:
        layers: The layers whose counters may change, by path.
        recalibrated: The paths of those that were recalibrated.
        batches: The batches that the statistics come from.
    """
    counters = _read({path: counter for path, layer in layers.items() if (counter := _counter(layer)) is not None})
    moving = [path for path in counters if layers[path].momentum is not None]
    settled = settled_count(layers[path] for path in recalibrated if path in layers)
    number = max([settled, *(counters[path] for path in moving)])
    wanted = dict.fromkeys(moving, number)
    wanted |= {path: batches for path in counters if path in recalibrated and path not in moving}
    return {path: min(value, _largest(layers[path])) for path, value in wanted.items()}


@torch.no_grad()
def write_counters(layers: Mapping[str, _BatchNorm], new: Mapping[str, int]) -> WrittenCounters:
    """Write the counters of layers, within a block of `all_or_nothing`.

    Args:
        layers: The layers by path.
        new: The new value of each counter, by path.
    """
    old = _read({path: _existing(layers, path) for path in new})
    changed = {path: (old[path], value) for path, value in new.items() if old[path] != value}

    def require_unchanged() -> None:
        for path, (_, value) in changed.items():
            counter = _counter(layers[path])
            if counter is None or int(counter) != value:
                got = "none" if counter is None else str(int(counter))
                raise UsageError(
                    f"undo: num_batches_tracked of {path or 'the model'} must still be {value}, got {got}. "
                    "Undo the later changes first."
                )

    def restore() -> None:
        with torch.no_grad():
            for path, (before, _) in changed.items():
                _existing(layers, path).fill_(before)

    for path, (_, value) in changed.items():
        _existing(layers, path).fill_(value)
    return WrittenCounters(require_unchanged, restore, changed)


def _read(counters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the values of counters by path, each of one number."""
    values = to_host([*counters.values()])
    return {path: int(one.to(torch.int64).numpy().item()) for path, one in zip(counters, values, strict=True)}


def _counter(layer: _BatchNorm) -> Tensor | None:
    """Return the counter; None where there is none, or where it is no tensor."""
    counter: object = layer.num_batches_tracked
    return counter if isinstance(counter, Tensor) else None


def _existing(layers: Mapping[str, _BatchNorm], path: str) -> Tensor:
    counter = _counter(layers[path])
    assert counter is not None  # new_counters left the others out
    return counter


def _largest(layer: _BatchNorm) -> int:
    counter = _counter(layer)
    is_integer = counter is not None and not counter.is_floating_point()
    return torch.iinfo(counter.dtype).max if counter is not None and is_integer else _LARGEST
