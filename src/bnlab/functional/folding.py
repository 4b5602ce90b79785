"""Folding BN with fixed statistics into the linear layer before or after it."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.functional.moments import widened

__all__ = ["fold_into_consumer", "fold_into_producer", "scale_and_shift"]


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return a and b of y = a x + b, the form of BN with fixed statistics.

    a = gamma/sqrt(var + eps), b = beta - mean a; each of shape (C,), float64.

    Source:
        Ioffe and Szegedy 2015, Algorithm 2, line 11.
    """
    scale = (widened(var) + eps).rsqrt()
    scale = scale if weight is None else scale * widened(weight)
    shift = -widened(mean) * scale
    return scale, shift if bias is None else shift + widened(bias)


def fold_into_producer(
    scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the convolution or linear layer before the BN, with the BN folded in.

    W' = a W along the output channels, and b' = a b + shift. Both are computed in float64 and rounded once.

    Args:
        scale: a of :func:`scale_and_shift`, shape (C_out,).
        shift: b of :func:`scale_and_shift`, shape (C_out,).
        weight: Shape (C_out, C_in/groups, *kernel); (C_in, C_out/groups, *kernel) if transposed.
        bias: Shape (C_out,) or None.
        transposed: Whether the layer is a transposed convolution.
        groups: The number of groups of the convolution.

    Returns:
        Weight and bias, in the dtype of `weight`.
    """
    wide = widened(weight)
    if transposed:
        grouped = wide.reshape(groups, -1, *weight.shape[1:])
        factor = scale.reshape(groups, 1, -1, *([1] * (weight.dim() - 2)))
        folded = (grouped * factor).reshape(weight.shape)
    else:
        folded = wide * scale.reshape(-1, *([1] * (weight.dim() - 1)))
    offset = shift if bias is None else scale * widened(bias) + shift
    return folded.to(weight.dtype), offset.to(weight.dtype)


def fold_into_consumer(
    scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the convolution or linear layer after the BN, with the BN folded in.

    W' = W a along the input channels, and b' = b + W shift, summed over the input channels and the kernel. The fold is
    exact only where no padding is added between the two, because BN does not map 0 to 0.

    Args:
        scale: Shape (C_in,).
        shift: Shape (C_in,).
        weight: Shape (C_out, C_in/groups, *kernel).
        bias: Shape (C_out,) or None.
        groups: The number of groups of the convolution.
    """
    wide = widened(weight).reshape(groups, -1, *weight.shape[1:])
    trailing = [1] * (weight.dim() - 2)
    by_group = (groups, 1, -1, *trailing)
    folded = (wide * scale.reshape(by_group)).reshape(weight.shape)
    offset = (wide * shift.reshape(by_group)).flatten(2).sum(2).reshape(-1)
    offset = offset if bias is None else offset + widened(bias)
    return folded.to(weight.dtype), torch.as_tensor(offset).to(weight.dtype)
