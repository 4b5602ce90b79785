"""Layers of torch that run on bnlab's kernels while they are watched, and leave exact statistics."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.kernels import batch_norm_train, native
from bnlab.observe.passes.batch_pass import Scratch, leaves_statistics

__all__ = ["ExactScratch", "scratch_of"]


class ExactScratch(Scratch):
    """Scratch buffers of a layer of torch on the CPU, whose statistics are right in every layout and dtype.

    Its forward is replaced; `untouched` puts it back.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        self._layer = layer
        self.mean, self.var = self.mean.to(torch.float64), self.var.to(torch.float64)
        layer.forward = self._forward  # type: ignore[method-assign]

    def _forward(self, input: Tensor) -> Tensor:
        """Return the transform with the statistics of the batch, and keep them."""
        layer = self._layer
        layer._check_input_dim(input)  # type: ignore[no-untyped-call] # noqa: SLF001 - torch's forward begins so
        arguments = (input, layer.weight, layer.bias, None, layer.eps)
        ready = input.dtype in native.DTYPES and input.device.type == "cpu"
        y, self.mean, var = native.forward(*arguments) if ready else batch_norm_train(*arguments)
        count = input.numel() // max(input.size(1), 1)
        self.var = var * (count / max(count - 1, 1))
        return y

    def of_torch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance as torch's own kernel takes them, which may be off."""
        mean, var = (torch.zeros(x.size(1), dtype=self._own_dtype) for _ in range(2))
        F.batch_norm(x, mean, var, self._layer.weight, self._layer.bias, True, 1.0, self._layer.eps)
        return mean.to(torch.float64), var.to(torch.float64)

    @property
    def _own_dtype(self) -> torch.dtype:
        weight: Tensor | None = self._layer.weight
        return torch.float32 if weight is None else weight.dtype


def scratch_of(layer: nn.Module, *, of_ours: bool = False) -> Scratch | None:
    """Return what a layer leaves its statistics in; None if it leaves none.

    Args:
        layer: A BN layer.
        of_ours: Whether the plain layers of bnlab count too, whose statistics are exact in every layout.
    """
    if _runs_on_kernels(layer):
        return ExactScratch(layer)
    return Scratch(layer) if leaves_statistics(layer, of_ours=of_ours) else None


def _runs_on_kernels(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    if native.unavailable() is not None or not leaves_statistics(layer):
        return False
    tensors = [*layer.parameters(), *layer.buffers()]
    return (
        type(layer).forward is _BatchNorm.forward
        and "forward" not in vars(layer)
        and all(tensor.device.type == "cpu" for tensor in tensors)
    )
