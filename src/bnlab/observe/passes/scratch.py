"""Provides buffers in which a layer leaves the statistics of each batch while it is watched.

A layer of torch runs on the kernels of bnlab during that time, and leaves exact statistics. On other devices than the
CPU it leaves the statistics that it computes itself where a pass asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab.nn as bnlab_nn
from bnlab.kernels import batch_norm_train, native
from bnlab.kernels.request import needs_formulas
from bnlab.kernels.statistics import normalized_with_statistics
from bnlab.nn.base import BatchNormBase
from bnlab.observe.evidence import Floats
from bnlab.observe.transfers import is_at_hand, to_host

__all__ = ["ExactScratch", "Scratch", "scratch_of", "statistics_in"]

_UNWRITTEN = -1.0
"""A variance that no layer can compute, which marks the buffer as unwritten."""

_SLOTS = 32
"""Number of batches whose statistics wait in one tensor of a device, which is filled with one operator."""


class Scratch:
    """Buffers in which a layer leaves the statistics of a batch. `Subject.untouched` restores the layer.

    On a device every batch has buffers of its own, because the host reads them later.

    Attributes:
        mean: Mean of the last batch. Shape (C,).
        var: Variance of the last batch. Shape (C,).
        factor: What makes the variance unbiased.
        is_written: Whether the buffers show what the layer did. Only they show whether the layer wrote anything.
    """

    factor = 1.0
    is_written = True

    def __init__(self, layer: _BatchNorm) -> None:
        self._layer, self._statistics = layer, (layer.running_mean, layer.running_var)
        weight: Tensor | None = layer.weight
        like = weight if weight is not None else next(iter(layer.buffers()), torch.zeros(()))
        self._dtype = like.dtype if like.is_floating_point() else torch.float32
        self._slots: list[Tensor] = []
        self._make(torch.device("cpu"))
        layer.num_batches_tracked = None
        layer.momentum, layer.track_running_stats, layer.training = 1.0, True, True

    def _make(self, device: torch.device) -> None:
        self.mean = torch.zeros(self._layer.num_features, dtype=self._dtype_on(device), device=device)
        self.var = torch.full_like(self.mean, _UNWRITTEN)

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        is_exact = isinstance(self._layer, BatchNormBase) and device.type != "mps"
        return torch.float64 if is_exact else self._dtype

    def put(self, x: Tensor) -> None:
        """Mark the buffers as unwritten, and give them to the layer, which is about to run on a batch.

        The batch decides on their device, because a layer without parameters and buffers does not show its own.
        """
        if is_at_hand(x):
            if self.mean.device != x.device:
                self._make(x.device)
            self.mean.zero_()
            self.var.fill_(_UNWRITTEN)
        else:
            self._take_slot(x.device)
        self._layer.running_mean, self._layer.running_var = self.mean, self.var

    def _take_slot(self, device: torch.device) -> None:
        if not self._slots or self._slots[-1].device != device:
            shape = _SLOTS, 2, self._layer.num_features
            self._slots = list(torch.full(shape, _UNWRITTEN, dtype=self._dtype_on(device), device=device).unbind())
        self.mean, self.var = self._slots.pop().unbind()

    def take_away(self) -> None:
        """Give its running statistics back to the layer, which other modules may read."""
        self._layer.running_mean, self._layer.running_var = self._statistics

    @property
    def buffers(self) -> list[Tensor]:
        """The mean and the variance, which the next batch on a device leaves alone; empty if they are unwritten."""
        return [self.mean, self.var] if self.is_written else []

    def read(self) -> tuple[Floats, Floats] | None:
        """Return mean and unbiased variance of the batch in float64; None if the layer did not write them."""
        return statistics_in(to_host(self.buffers), self.factor) if self.is_written else None


def statistics_in(buffers: Sequence[Tensor], factor: float) -> tuple[Floats, Floats] | None:
    """Return the mean and variance in buffers of the host in float64, the variance times a factor, or None."""
    means, variances = (tensor.numpy().astype(np.float64) for tensor in buffers)
    return None if (variances == _UNWRITTEN).all() else (means, variances * factor)


class ExactScratch(Scratch):
    """Scratch buffers of a layer of torch with exact statistics in every layout and dtype, on the CPU or a device.

    The class replaces the forward of the layer, and `Subject.untouched` restores it.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        layer.forward = self._forward  # type: ignore[method-assign]

    def put(self, x: Tensor) -> None:  # noqa: ARG002 - the forward makes new tensors wherever the batch is
        """Mark the statistics as unwritten."""
        self.is_written = False

    def _forward(self, input: Tensor) -> Tensor:
        """Return the output with batch statistics, and keep these statistics."""
        layer = self._layer
        layer._check_input_dim(input)  # type: ignore[no-untyped-call] # noqa: SLF001 - torch's forward begins so
        if needs_formulas():  # under vmap these are the statistics of many batches
            return batch_norm_train(input, layer.weight, layer.bias, None, layer.eps)[0]
        y, self.mean, self.var = normalized_with_statistics(input, layer.weight, layer.bias, layer.eps)
        count = input.numel() // max(input.size(1), 1)
        self.factor, self.is_written = count / max(count - 1, 1), True
        return y

    def of_torch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance as the kernel of torch computes them, which may be inexact."""
        mean, var = (torch.zeros(x.size(1), dtype=self._own_dtype, device=x.device) for _ in range(2))
        F.batch_norm(x, mean, var, self._layer.weight, self._layer.bias, True, 1.0, self._layer.eps)
        return mean, var

    @property
    def _own_dtype(self) -> torch.dtype:
        weight: Tensor | None = self._layer.weight
        return torch.float32 if weight is None else weight.dtype


def scratch_of(layer: nn.Module, *, wants_own: bool = False) -> Scratch | None:
    """Give a layer scratch buffers and return them; return None for a layer that would not write its statistics.

    Args:
        layer: The layer.
        wants_own: Whether the statistics that the layer itself computes are wanted too. On a device the layer then
            keeps its own kernels.
    """
    if _runs_on_kernels(layer, wants_own=wants_own):
        return ExactScratch(layer)
    return Scratch(layer) if _leaves_statistics(layer) else None


def _leaves_statistics(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Return whether a layer writes the statistics of each batch to `Scratch` buffers; those of bnlab are exact."""
    if isinstance(layer, BatchNormBase):
        return type(layer) in (bnlab_nn.BatchNorm1d, bnlab_nn.BatchNorm2d, bnlab_nn.BatchNorm3d)
    plain = isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    weight = getattr(layer, "weight", None)
    dtype = torch.float32 if weight is None else weight.dtype
    return plain and dtype in (torch.float32, torch.float64)


def _runs_on_kernels(layer: nn.Module, *, wants_own: bool) -> TypeGuard[_BatchNorm]:
    if isinstance(layer, BatchNormBase) or not _leaves_statistics(layer):
        return False
    if type(layer).forward is not _BatchNorm.forward or "forward" in vars(layer):
        return False
    devices = {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())}
    if devices <= {"cpu"}:
        return native.unavailable() is None
    return not wants_own and devices.isdisjoint(("cpu", "meta", "mps"))  # mps has no float64
