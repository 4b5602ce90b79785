"""GPU kernels in Triton. `device/` holds the code that runs on the GPU; importing bnlab imports none of it."""

from __future__ import annotations

from torch import Tensor

from bnlab.kernels import fused
from bnlab.kernels.backends.triton import calls
from bnlab.kernels.backends.triton.availability import unavailable
from bnlab.kernels.request import Request

__all__ = ["backward", "forward", "refuse", "unavailable"]


def refuse(request: Request) -> str | None:
    """Return the reason against the kernels for a request, or None."""
    reason = unavailable(request.device)
    if reason is not None:
        return reason
    if request.dtype not in fused.names_of_dtypes():
        return f"it does not support {request.dtype}"
    if request.context == "transform":
        return "torch.func and forward mode need formulas"
    return None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64."""
    return fused.forward(calls, x, weight, bias, mask, eps)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in the dtype of `x`, dgamma and dbeta in float32, or in the dtype of a float64 weight."""
    return fused.backward(calls, grad, x, weight, mask, mean, var, eps)
