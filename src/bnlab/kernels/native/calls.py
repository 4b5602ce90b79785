"""The operators of the compiled library, with named arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.kernels.form import Form, Running
from bnlab.kernels.native.library import unavailable

__all__ = ["SATURATED", "apply", "backward", "statistics", "train"]

SATURATED = 2
"""The status of a call of `train` that clamped the running variance to the range of its dtype."""


class _Operators(NamedTuple):
    train: Callable[..., Any]
    apply: Callable[..., Any]
    backward: Callable[..., Any]
    statistics: Callable[..., Any]


@cache
def _operators() -> _Operators:
    """Load the library and look up its operators, once."""
    reason = unavailable()
    if reason is not None:
        raise AssertionError(f"the native kernels are not there: {reason}")
    library = torch.ops.bnlab_native
    return _Operators(
        library.train.default, library.apply.default, library.backward.default, library.statistics.default
    )


def train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    running: Running = Running(),  # noqa: B008 - a tuple never changes
    momentum: float = 0.0,
    skip_nonfinite: bool = False,
    want_bits: bool = False,
    room: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Normalise with batch statistics, add the residual, activate, and update the running statistics.

    Args:
        x: Shape (N, C, *spatial), dense, of one of `native.DTYPES`.
        residual: Shape, dtype and strides of `x`, or None.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        form: The form, of which `train` reads the activation and eps.
        running: The buffers to update.
        momentum: Weight of the new batch; a value below 0 stands for 1/batches.
        skip_nonfinite: Whether a batch with an inf or NaN leaves the running statistics and their counter unchanged.
        want_bits: Whether to keep the sign of every output where a residual is added. The gradient needs it.
        room: The smallest size of the bits in bytes. Unused bytes are 0.

    Returns:
        y: Shape, dtype and strides of `x`.
        moments: Mean and biased variance, shape (2, C), float64.
        bits: uint8, empty where none are wanted.
        status: `SATURATED`, 0, or the status of a skipped batch.
    """
    _, eps, activation, slope, _ = form
    result: tuple[Tensor, Tensor, Tensor, int] = _operators().train(
        x, residual, weight, bias, *running, momentum, eps, activation, slope, skip_nonfinite, want_bits, room
    )
    return result


def apply(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    want_bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with fixed statistics of shape (C,), add and activate. For other arguments see :func:`train`."""
    result: tuple[Tensor, Tensor, Tensor] = _operators().apply(
        x, residual, mean, var, weight, bias, form.eps, form.activation, form.slope, want_bits
    )
    return result


def backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    weights: Tensor | None = None,
    bits: Tensor | None = None,
    want_dx: bool = True,
    want_dresidual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight and bias. The first two are empty if the caller does not want them.

    Args:
        dy: Gradient of the output; shape, dtype and strides of `x`.
        x: Input of the forward pass.
        moments: The moments that `train` or `apply` returned.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        form: The form of the forward pass.
        weights: Weight of every position, shape (N, positions), float32, or None.
        bits: The bits that `train` or `apply` returned, or None.
        want_dx: Whether the gradient of `x` is wanted.
        want_dresidual: Whether the gradient of the residual is wanted.
    """
    by_batch, eps, activation, slope, _ = form
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _operators().backward(
        dy, x, weights, moments, weight, bias, bits, by_batch, eps, activation, slope, want_dx, want_dresidual
    )
    return result


def statistics(x: Tensor, weights: Tensor | None) -> tuple[Tensor, float]:
    """Return mean and biased variance, shape (2, C), float64, and the sum of the weights, shape (N, positions)."""
    result: tuple[Tensor, float] = _operators().statistics(x, weights)
    return result
