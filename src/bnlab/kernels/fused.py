"""A backend whose kernels do everything in few passes over memory: the same steps for the CPU and for GPUs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bnlab.kernels.dense import dense, position_weights, same_layout
from bnlab.kernels.form import Form, Running

__all__ = ["DTYPES", "Calls", "backward", "forward", "names_of_dtypes", "statistics"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels read and write. Sums and statistics are wider."""


class Calls(Protocol):
    """The operators of a set of kernels. `bnlab.kernels.native.calls` describes their arguments and results."""

    def train(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        *,
        running: Running = ...,
        momentum: float = ...,
        skip_nonfinite: bool = ...,
        want_bits: bool = ...,
        room: int = ...,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Normalise with batch statistics."""

    def apply(
        self,
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        *,
        want_bits: bool = ...,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise with fixed statistics."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        *,
        weights: Tensor | None = ...,
        bits: Tensor | None = ...,
        want_dx: bool = ...,
        want_dresidual: bool = ...,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of x, residual, weight and bias."""

    def statistics(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Return mean and biased variance, and the sum of the weights."""


def names_of_dtypes() -> tuple[str, ...]:
    """Return the names of the dtypes that the kernels read."""
    return tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def forward(
    calls: Calls, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the biased batch statistics in float64."""
    x, form = dense(x), Form(by_batch=True, eps=eps)
    if mask is None:
        y, moments, _, _ = calls.train(x, None, weight, bias, form)
    else:
        moments, _ = calls.statistics(x, position_weights(mask, x))
        y, _, _ = calls.apply(x, None, moments[0], moments[1], weight, bias, form)
    return y, moments[0].clone(), moments[1].clone()


def backward(
    calls: Calls,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
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
        weights=None if mask is None else position_weights(mask, x),
    )
    return dx, dweight, dbias


def statistics(calls: Calls, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return mean and biased variance of every channel in float64, and the sum of the weights of its values.

    The sum is a tensor of shape () on a GPU.
    """
    x = dense(x)
    moments, total = calls.statistics(x, None if mask is None else position_weights(mask, x))
    return moments[0], moments[1], total
