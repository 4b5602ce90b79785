"""C++ kernels that run on torch's own threads. `src/abi.h` describes what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.kernels.native import calls
from bnlab.kernels.native.calls import Form
from bnlab.kernels.native.library import unavailable
from bnlab.kernels.request import Request, is_channels_last

__all__ = ["DTYPES", "backward", "dense", "forward", "refuse", "same_layout", "statistics", "unavailable"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels read and write. Sums and statistics are wider."""

_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def refuse(request: Request) -> str | None:
    """Return the reason against the kernels for a request, or None."""
    if request.device != "cpu":
        return "it runs on the CPU only"
    if request.dtype not in _NAMES:
        return f"it does not support {request.dtype}"
    if request.context == "transform":
        return "torch.func and forward mode need formulas"
    return unavailable()


def dense(x: Tensor) -> Tensor:
    """Return `x` in one of the layouts that the kernels read: contiguous or channels_last."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64."""
    x, form = dense(x), Form(by_batch=True, eps=eps)
    if mask is None:
        y, moments, _, _ = calls.train(x, None, weight, bias, form)
    else:
        moments, _ = calls.statistics(x, _position_weights(mask, x))
        y, _, _ = calls.apply(x, None, moments[0], moments[1], weight, bias, form)
    return y, moments[0].clone(), moments[1].clone()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float32, or in the dtype of a float64 weight."""
    x = dense(x)
    dx, _, dweight, dbias = calls.backward(
        same_layout(grad, x),
        x,
        torch.stack([mean, var]),
        weight,
        None,
        Form(by_batch=True, eps=eps),
        weights=None if mask is None else _position_weights(mask, x),
    )
    return dx, dweight, dbias


def statistics(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Return mean and biased variance of every channel in float64, and the sum of the weights of its values."""
    x = dense(x)
    moments, total = calls.statistics(x, None if mask is None else _position_weights(mask, x))
    return moments[0], moments[1], total


def same_layout(values: Tensor, x: Tensor) -> Tensor:
    """Return values with the dtype and strides of `x`, which has the same shape and is dense."""
    if values.dtype == x.dtype and ((values.is_contiguous() and x.is_contiguous()) or values.stride() == x.stride()):
        return values
    return torch.empty_like(x).copy_(values)


def _position_weights(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(torch.float32).expand(x.size(0), 1, *x.shape[2:]).reshape(x.size(0), -1).contiguous()
