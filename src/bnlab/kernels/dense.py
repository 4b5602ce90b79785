"""Tensors in the layouts that the kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.kernels.request import is_channels_last

__all__ = ["dense", "position_weights", "same_layout"]


def dense(x: Tensor) -> Tensor:
    """Return `x` in one of the layouts that the kernels read: contiguous or channels_last."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous()


def same_layout(values: Tensor, x: Tensor) -> Tensor:
    """Return values with the dtype and strides of `x`, which has the same shape and is dense."""
    if values.dtype == x.dtype and ((values.is_contiguous() and x.is_contiguous()) or values.stride() == x.stride()):
        return values
    return torch.empty_like(x).copy_(values)


def position_weights(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask that broadcasts to (N, 1, *spatial) as one weight for every position, shape (N, S), float32."""
    return mask.to(torch.float32).expand(x.size(0), 1, *x.shape[2:]).reshape(x.size(0), -1).contiguous()
