"""Compares the running statistics of the ranks of a distributed run, without a rank waiting for another one."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.conventions import noise_of_average
from bnlab.observe.training_run import RankSpread
from bnlab.observe.transfers import Pending

__all__ = ["Ranks"]

_CHANNELS = 32
"""Number of channels of a layer that are compared, spread evenly over it."""

_EMPTY = b""
_KEPT = 4
"""Number of comparisons that may wait for the slowest rank."""


@dataclass(frozen=True)
class _Shot:
    step: int
    rows: list[Tensor]


class Ranks:
    """Sends the running statistics of this rank through the store of torch.distributed, and compares those of all.

    Rank 0 compares. A collective operation would hang where only some ranks watch; the store never waits.

    Args:
        layers: The layers, in the same order on every rank.
        noise_of: Returns the variance of the batch means and of ln(var)/2 of a layer, by its index, in squared standard
            deviations; None where it is not known yet.
        use: Called on rank 0 with the index of a layer and the comparison.
    """

    def __init__(
        self,
        layers: Sequence[_BatchNorm],
        noise_of: Callable[[int], tuple[float, float] | None],
        use: Callable[[int, RankSpread], None],
    ) -> None:
        self._layers = layers
        self._noise_of = noise_of
        self._use = use
        self._waiting: list[_Shot] = []
        self._sent: list[str] = []

    def send(self, step: int, pending: Pending) -> None:
        """Send the statistics of a step, and compare those that have arrived.

        Args:
            step: Number of steps so far, equal on all ranks.
            pending: Takes the statistics, which the host reads later where they are on a device.
        """
        if _is_distributed():
            pending.add([_rows(layer) for layer in self._layers], lambda rows: self._send(step, rows))

    def receive(self) -> None:
        """Compare what has arrived from every rank."""
        if not self._waiting or not _is_distributed():
            return
        store, world = _store(), dist.get_world_size()
        for shot in [*self._waiting]:
            keys = [_key(shot.step, rank) for rank in range(1, world)]
            if store.check(keys):
                self._waiting.remove(shot)
                others = [_unpacked(store.get(key)) for key in keys]
                for key in keys:
                    store.set(key, _EMPTY)
                self._compare(shot, [rows for rows in others if len(rows) == len(shot.rows)])

    def _send(self, step: int, rows: list[Tensor]) -> None:
        rows = [one.to(torch.float64) for one in rows]
        if dist.get_rank() == 0:
            self._waiting = [*self._waiting, _Shot(step, rows)][-_KEPT:]
            self.receive()
            return
        key = _key(step, dist.get_rank())
        _store().set(key, _packed(rows))
        self._sent.append(key)
        if len(self._sent) > _KEPT:  # emptied, not deleted: a rank that reads a deleted key would wait for it
            _store().set(self._sent.pop(0), _EMPTY)

    def _compare(self, shot: _Shot, others: Sequence[list[Tensor]]) -> None:
        for index, own in enumerate(shot.rows):
            rows = [own, *(other[index] for other in others)]
            noise = self._noise_of(index)
            usable = len(rows) > 1 and all(one.shape == own.shape and bool(one.isfinite().all()) for one in rows)
            if noise is not None and usable and own.numel():
                self._use(index, _spread(shot.step, torch.stack(rows), noise, self._layers[index]))


def _spread(step: int, rows: Tensor, noise: tuple[float, float], layer: _BatchNorm) -> RankSpread:
    """Return how far ranks differ; `rows` has the shape (ranks, 2, channels): means, then variances."""
    mean, var = rows[:, 0], rows[:, 1].clamp(min=0) + layer.eps
    parts = ((mean.amax(0) - mean.amin(0)) / var.mean(0).sqrt(), (var.amax(0).log() - var.amin(0).log()) / 2)
    momentum = 1.0 if layer.momentum is None else layer.momentum
    spreads = [
        RankSpread(
            step=step,
            ranks=len(rows),
            difference=float((part**2).mean().sqrt()),
            expected=_range_of_normals(len(rows)) * math.sqrt(noise_of_average(momentum) * own_noise),
        )
        for part, own_noise in zip(parts, noise, strict=True)
    ]
    return max(spreads, key=lambda spread: spread.difference / max(spread.expected, 1e-12))


@cache
def _range_of_normals(count: int) -> float:
    """Return the root mean square of the range of as many standard normal values: sqrt(2) for two."""
    draws = torch.randn(20_000, count, generator=torch.Generator().manual_seed(0))
    return float((draws.amax(1) - draws.amin(1)).square().mean().sqrt())


@torch.no_grad()
def _rows(layer: _BatchNorm) -> Tensor:
    """Return the mean and variance of some channels, shape (2, channels)."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return torch.zeros(2, 0)
    step = max(1, mean.numel() // _CHANNELS)
    return torch.stack([mean[::step], var[::step]]).float()


def _packed(values: Sequence[Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(list(values), buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> list[Tensor]:
    if not packed:
        return []
    values: list[Tensor] = torch.load(io.BytesIO(packed), weights_only=True)
    return values


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _store() -> Any:  # noqa: ANN401 - torch does not name the types of its stores
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public way to it


def _key(step: int, rank: int) -> str:
    return f"bnlab/watch/{step}/{rank}"
