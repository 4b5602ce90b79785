"""C++ kernels that run on torch's own threads; what they compute is described in `src/abi.h`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from bnlab.kernels.native.library import unavailable

if TYPE_CHECKING:
    from bnlab.kernels.dispatch import Request

__all__ = [
    "DTYPES",
    "backward",
    "dense",
    "forward",
    "is_channels_last",
    "operators",
    "refuse",
    "same_layout",
    "statistics",
    "unavailable",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; sums and statistics are wider."""

_IDENTITY = 0
_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def refuse(request: Request) -> str | None:
    """Return why the kernels cannot be used for a request, or None."""
    if request.device != "cpu":
        return "it runs on the CPU"
    if request.dtype not in _NAMES:
        return f"it knows no {request.dtype}"
    return unavailable()


def operators() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return the operators `train`, `apply` and `backward`, looked up once; without the library none may be called."""
    if unavailable() is not None:
        return _missing, _missing, _missing
    found = torch.ops.bnlab_native
    return found.train.default, found.apply.default, found.backward.default


def _missing(*_: object) -> NoReturn:
    raise AssertionError(f"the native kernels are not there: {unavailable()}")


def dense(x: Tensor) -> Tensor:
    """Return `x` in one of the layouts the kernels read: planes, or the channels last."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is in channels_last or channels_last_3d."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64."""
    x = dense(x)
    if mask is None:
        y, moments, _, _ = torch.ops.bnlab_native.train(
            x, None, weight, bias, None, None, None, None, 0.0, eps, _IDENTITY, 0.0, False, False
        )
    else:
        moments, _ = torch.ops.bnlab_native.statistics(x, _position_weights(mask, x))
        y, _, _ = torch.ops.bnlab_native.apply(
            x, None, moments[0], moments[1], weight, bias, eps, _IDENTITY, 0.0, False
        )
    return y, moments[0].clone(), moments[1].clone()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float32, or in the dtype of a float64 weight."""
    x = dense(x)
    dx, _, dweight, dbias = torch.ops.bnlab_native.backward(
        same_layout(grad, x),
        x,
        None if mask is None else _position_weights(mask, x),
        torch.stack([mean, var]),
        weight,
        None,
        None,
        True,
        eps,
        _IDENTITY,
        0.0,
        True,
        False,
    )
    return dx, dweight, dbias


def statistics(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Return mean and biased variance of every channel in float64, and the sum of the weights of its values."""
    x = dense(x)
    moments, total = torch.ops.bnlab_native.statistics(x, None if mask is None else _position_weights(mask, x))
    return moments[0], moments[1], total


def same_layout(values: Tensor, x: Tensor) -> Tensor:
    """Return values with the dtype and strides of `x`, which has the same shape and is dense."""
    if values.stride() == x.stride() and values.dtype == x.dtype:
        return values
    return torch.empty_like(x).copy_(values)


def _position_weights(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(torch.float32).expand(x.size(0), 1, *x.shape[2:]).reshape(x.size(0), -1).contiguous()
