"""Provides buffers in which a layer leaves the statistics of each batch while it is watched.

On the CPU a layer of torch runs on the kernels of bnlab during that time, and leaves exact statistics. On other devices
it leaves the statistics that it computes itself.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab.nn as bnlab_nn
from bnlab.kernels import batch_norm_train, native
from bnlab.kernels.request import needs_formulas
from bnlab.nn.base import BatchNormBase
from bnlab.observe.evidence import Floats

__all__ = ["ExactScratch", "Scratch", "scratch_of"]

_UNWRITTEN = -1.0
"""A variance that no layer can compute, which marks the buffer as unwritten."""


class Scratch:
    """Buffers in which a layer leaves the statistics of a batch. `Subject.untouched` restores the layer.

    Attributes:
        mean: Mean of the last batch. Shape (C,).
        var: Unbiased variance of the last batch. Shape (C,).
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self._layer, self._statistics = layer, (layer.running_mean, layer.running_var)
        weight: Tensor | None = layer.weight
        like = weight if weight is not None else next(iter(layer.buffers()), torch.zeros(()))
        self._dtype = like.dtype if like.is_floating_point() else torch.float32
        self._make(torch.device("cpu"))
        layer.num_batches_tracked = None
        layer.momentum, layer.track_running_stats, layer.training = 1.0, True, True

    def _make(self, device: torch.device) -> None:
        is_exact = isinstance(self._layer, BatchNormBase) and device.type != "mps"
        dtype = torch.float64 if is_exact else self._dtype
        self.mean = torch.zeros(self._layer.num_features, dtype=dtype, device=device)
        self.var = torch.full_like(self.mean, _UNWRITTEN)

    def put(self, x: Tensor) -> None:
        """Mark the buffers as unwritten, and give them to the layer, which is about to run on a batch.

        The batch decides on their device, because a layer without parameters and buffers does not show its own.
        """
        if self.mean.device != x.device:
            self._make(x.device)
        self.mean.zero_()
        self.var.fill_(_UNWRITTEN)
        self._layer.running_mean, self._layer.running_var = self.mean, self.var

    def take_away(self) -> None:
        """Give its running statistics back to the layer, which other modules may read."""
        self._layer.running_mean, self._layer.running_var = self._statistics

    def read(self) -> tuple[Floats, Floats] | None:
        """Return mean and unbiased variance of the batch in float64; None if the layer did not write them."""
        mean, var = (tensor.cpu().numpy().astype(np.float64) for tensor in (self.mean, self.var))
        return None if (var == _UNWRITTEN).all() else (mean, var)


class ExactScratch(Scratch):
    """Scratch buffers of a layer of torch on the CPU, with exact statistics in every layout and dtype.

    The class replaces the forward of the layer, and `Subject.untouched` restores it.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        self.mean, self.var = self.mean.to(torch.float64), self.var.to(torch.float64)
        layer.forward = self._forward  # type: ignore[method-assign]

    def _forward(self, input: Tensor) -> Tensor:
        """Return the output with batch statistics, and store these statistics."""
        layer = self._layer
        layer._check_input_dim(input)  # type: ignore[no-untyped-call] # noqa: SLF001 - torch's forward begins so
        arguments = (input, layer.weight, layer.bias, None, layer.eps)
        if needs_formulas():  # under vmap these are the statistics of many batches
            return batch_norm_train(*arguments)[0]
        ready = input.dtype in native.DTYPES and input.device.type == "cpu"
        y, self.mean, var = native.forward(*arguments) if ready else batch_norm_train(*arguments)
        count = input.numel() // max(input.size(1), 1)
        self.var = var * (count / max(count - 1, 1))
        return y

    def of_torch(self, x: Tensor) -> tuple[Floats, Floats]:
        """Return mean and unbiased variance as the kernel of torch computes them, which may be inexact."""
        mean, var = (torch.zeros(x.size(1), dtype=self._own_dtype, device=x.device) for _ in range(2))
        F.batch_norm(x, mean, var, self._layer.weight, self._layer.bias, True, 1.0, self._layer.eps)
        return mean.cpu().numpy().astype(np.float64), var.cpu().numpy().astype(np.float64)

    @property
    def _own_dtype(self) -> torch.dtype:
        weight: Tensor | None = self._layer.weight
        return torch.float32 if weight is None else weight.dtype


def scratch_of(layer: nn.Module) -> Scratch | None:
    """Give a layer scratch buffers and return them; return None for a layer that would not write its statistics."""
    if _runs_on_kernels(layer):
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


def _runs_on_kernels(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    if native.unavailable() is not None or isinstance(layer, BatchNormBase) or not _leaves_statistics(layer):
        return False
    tensors = [*layer.parameters(), *layer.buffers()]
    return (
        type(layer).forward is _BatchNorm.forward
        and "forward" not in vars(layer)
        and all(tensor.device.type == "cpu" for tensor in tensors)
    )
