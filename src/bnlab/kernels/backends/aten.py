"""torch's own operators, called on input that is shifted to a mean near 0: as `aten_device` says on a GPU.

On a CPU they are torch's kernels for BN, on contiguous planes. As torch calls them, these kernels are not accurate
enough. They fold the mean into y = a*x + b, which cancels where the mean is large. In channels_last, and in every input
of shape (N, C), they add up thousands of values in one float32. Neither happens with a small mean in contiguous planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.functional.moments import per_channel
from bnlab.kernels.backends import aten_device, reference
from bnlab.kernels.request import Request

__all__ = ["backward", "forward", "refuse"]

_SAMPLE = 1024
"""Values per channel in the sample mean that is subtracted. torch never splits a sum of so few between threads."""

_FAR = 2.0
"""Largest error of the sample mean, in standard deviations, before the input is shifted again."""

_SMALLEST_VARIANCE = 1e-30
"""The squares of smaller deviations are denormal in float32."""


def refuse(request: Request) -> str | None:
    """Return the reason against torch's operators for a request, or None."""
    if request.context == "transform":
        return "torch.func and forward mode need formulas"
    platform = "ROCm" if request.device == "cuda" and torch.version.hip else request.device
    if platform not in ("cpu", "cuda"):
        return f"its accuracy on {platform} has not been measured"
    if request.masked:
        return "it does not support masks"
    if request.dtype not in ("float32", "float16", "bfloat16"):
        return f"it keeps statistics of {request.dtype} in {request.dtype}"
    if request.count < 2:
        return "there is nothing to reduce"
    return None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64.

    On a CPU the reference backend takes over if float32 cannot hold the variance: if the variance overflows or
    vanishes, or the input is not finite. There the square of any float32 is finite.
    """
    if not x.is_cpu:
        return aten_device.forward(x, weight, bias, eps)
    pivot = _sample_mean(x)
    shifted = _planes(x.to(torch.float32) - per_channel(pivot, x))
    rest, var = torch.ops.aten.batch_norm_update_stats(shifted, None, None, 0.0)
    smallest, largest = map(float, torch.aminmax(var))
    vanished = smallest < _SMALLEST_VARIANCE and _varies(shifted[:, var < _SMALLEST_VARIANCE])
    if vanished or not largest < torch.finfo(torch.float32).max:
        return reference.forward(x, weight, bias, mask, eps)
    var = var.to(torch.float64)
    mean = pivot.to(torch.float64) + rest
    if bool((rest.square() > _FAR**2 * var).any()):
        shifted -= per_channel(rest, shifted)
        rest = torch.zeros_like(rest)
    alpha = (var + eps).rsqrt()
    alpha = alpha if weight is None else alpha * weight
    beta = -rest * alpha
    beta = beta if bias is None else beta + bias
    alpha, beta = (per_channel(values.to(torch.float32), shifted) for values in (alpha, beta))
    return _like(torch.addcmul(beta, shifted, alpha), x).to(x.dtype), mean, var


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float32, or in float64 on a GPU."""
    if not x.is_cpu:
        return aten_device.backward(grad, x, weight, mean, var, eps)
    representable = ((var >= _SMALLEST_VARIANCE) | (var == 0)) & (var < torch.finfo(torch.float32).max)
    if not bool(representable.all()):
        return reference.backward(grad, x, weight, mask, mean, var, eps)
    pivot = mean.to(torch.float32)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        _planes(grad.to(torch.float32)),
        _planes(x.to(torch.float32) - per_channel(pivot, x)),
        torch.ones_like(pivot) if weight is None else weight.to(torch.float32),
        None,
        None,
        (mean - pivot).to(torch.float32),
        (var + eps).rsqrt().to(torch.float32),
        True,
        eps,
        [True, True, True],
    )
    return _like(dx, x).to(x.dtype), dgamma, dbeta


def _sample_mean(x: Tensor) -> Tensor:
    """Return the float32 mean of the first values of each channel, which is near the mean of an unsorted batch."""
    first, room = x, _SAMPLE
    for dim in range(x.dim() - 1, -1, -1):
        if dim != 1:
            first = first.narrow(dim, 0, min(first.size(dim), room))
            room = max(1, room // first.size(dim))
    return first.mean([0, *range(2, x.dim())], dtype=torch.float32)


def _planes(x: Tensor) -> Tensor:
    """Return the values as contiguous planes of many positions, which torch never treats as channels_last.

    With one channel, or one position per sample, contiguous and channels_last have the same strides. The planes are
    then (N, C, L), or (1, C, N).
    """
    if x.dim() > 2 and x.size(1) > 1 and x[0, 0].numel() > 1:
        return x.contiguous()
    planes = x.reshape(x.size(0), x.size(1), -1)
    return (planes.permute(2, 1, 0) if planes.size(2) == 1 else planes).contiguous()


def _like(planes: Tensor, x: Tensor) -> Tensor:
    """Return planes in the shape of `x`. The result is no view, because an operator must not return one."""
    if planes.shape == x.shape:
        return planes
    if planes.shape != (x.size(0), x.size(1), x[0, 0].numel()):
        planes = planes.permute(2, 1, 0)
    return torch.empty_like(x, dtype=planes.dtype).copy_(planes.reshape(x.shape))


def _varies(planes: Tensor) -> bool:
    """Whether a channel with a float32 variance of 0 is not constant: its squares have then vanished."""
    return bool((planes != planes[:1, :, :1]).any())
