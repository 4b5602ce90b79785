"""BN with what follows it as one node of the graph, in eager mode on the CPU: the least work a step can be.

One operator normalises, adds a residual, applies the activation and moves the running statistics. Under a compiler, a
transform of torch.func or anything else that wants to see formulas, the operators of `kernels.operators` stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnlab.functional.moments import channel_sum, per_channel, widened
from bnlab.functional.transform import batch_norm_backward, normalize
from bnlab.kernels import native
from bnlab.kernels.operators import batch_norm_eval, is_transformed

__all__ = ["ACTIVATIONS", "SATURATED", "Running", "differentiable", "fused_eval", "fused_train", "fuses", "in_dtype_of"]

ACTIVATIONS: dict[str | None, tuple[int, float]] = {None: (0, 0.0), "relu": (1, 0.0), "leaky_relu": (2, 0.01)}
"""What the kernels can apply: their number for it, and the slope below 0."""

SATURATED = 2
"""The running variance has come to the end of the range of its dtype."""

_AVAILABLE = native.unavailable() is None
_TRAIN, _EVAL, _BACKWARD = native.operators()
_TENSORS = (Tensor, nn.Parameter)
_DTYPES = frozenset(native.DTYPES)


class Running(NamedTuple):
    """Buffers that an update moves in place; all None where there is none to move.

    `mean` and `var` are float32 or float64 of shape (C,), the counters int64 of shape ().
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    skipped: Tensor | None = None


def fuses(x: Tensor, residual: Tensor | None, activation: str | None) -> bool:
    """Whether one kernel does it all: dense tensors of one layout and dtype, in eager mode, without a transform."""
    return (
        _AVAILABLE
        and type(x) in _TENSORS
        and x.is_cpu
        and x.dtype in _DTYPES
        and activation in ACTIVATIONS
        and (x.is_contiguous() or native.is_channels_last(x))
        and (residual is None or _matches(residual, x))
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None  # noqa: SLF001 - what torch.jit.is_tracing asks
        and not is_transformed()
    )


def _matches(residual: Tensor, x: Tensor) -> bool:
    return (
        type(residual) in _TENSORS
        and residual.is_cpu
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.stride() == x.stride()
    )


def fused_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    momentum: float | None,
    eps: float,
    activation: str | None,
    skip_nonfinite: bool,
) -> tuple[Tensor, int]:
    """Return activation(BN(x) + residual) with the statistics of the batch, and what became of the running ones.

    Args:
        x: Shape (N, C, *spatial), at least 2 values per channel; what `fuses` lets through.
        residual: Shape, dtype and strides of `x`, or None.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        running: What to move.
        momentum: Weight of the new batch; None for 1/batches.
        eps: Added to the variance.
        activation: Key of `ACTIVATIONS`.
        skip_nonfinite: Whether a batch with an inf or NaN leaves the running statistics and their counter alone.

    Returns:
        y: Shape, dtype and strides of `x`; differentiable to any order.
        status: `SATURATED`, or 0, or that the batch was skipped.
    """
    number, slope = ACTIVATIONS[activation]
    by = -1.0 if momentum is None else momentum
    if torch.is_grad_enabled():
        found: tuple[Tensor, int] = _APPLY_TRAIN(
            x, residual, weight, bias, running, by, eps, number, slope, skip_nonfinite
        )
        return found
    y, _, _, status = _TRAIN(x, residual, weight, bias, *running, by, eps, number, slope, skip_nonfinite, False)
    return y, status


def fused_eval(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Return activation(BN(x) + residual) with fixed statistics; arguments as for :func:`fused_train`."""
    number, slope = ACTIVATIONS[activation]
    arguments = (x, residual, mean, var, weight, bias, eps, number, slope)
    if torch.is_grad_enabled() and number == 0 and not (_trains(weight) or _trains(bias)):
        scaled: Tensor = _APPLY_SCALE(*arguments)
        return scaled
    if torch.is_grad_enabled():
        found: Tensor = _APPLY_EVAL(*arguments)
        return found
    y, _, _ = _EVAL(*arguments, False)
    return y  # type: ignore[no-any-return]


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running,
        momentum: float,
        eps: float,
        number: int,
        slope: float,
        skip_nonfinite: bool,
    ) -> tuple[Tensor, int]:
        y, moments, bits, status = _TRAIN(
            x, residual, weight, bias, *running, momentum, eps, number, slope, skip_nonfinite, True
        )
        ctx.save_for_backward(x, weight, bias, moments, bits)
        ctx.how = (True, eps, number, slope, residual is not None)
        return y, status

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        wants = ctx.needs_input_grad
        dx, dresidual, dweight, dbias = _gradients(ctx, dy, wants[0], wants[1])
        return dx, dresidual, dweight, dbias, None, None, None, None, None, None


class _Eval(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # noqa: ANN401
        x, residual, _, _, weight, bias, eps, number, slope = arguments
        y, moments, bits = _EVAL(*arguments, True)
        ctx.save_for_backward(x, weight, bias, moments, bits)
        ctx.how = (False, eps, number, slope, residual is not None)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        wants = ctx.needs_input_grad
        dx, dresidual, dweight, dbias = _gradients(ctx, dy, wants[0], wants[1])
        return dx, dresidual, None, None, dweight, dbias, None, None, None


class _Scale(torch.autograd.Function):
    """Eval mode without parameters that train: the gradient needs nothing of the size of the input."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # noqa: ANN401
        y, moments, _ = _EVAL(*arguments, False)
        ctx.save_for_backward(moments[1].clone(), arguments[4])
        ctx.eps = arguments[6]
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        var, weight = ctx.saved_tensors
        dresidual = dy if ctx.needs_input_grad[1] else None
        dx = batch_norm_eval(dy, torch.zeros_like(var), var, weight, None, ctx.eps)
        return dx, dresidual, None, None, None, None, None, None, None


def _gradients(ctx: Any, dy: Tensor, want_dx: bool, want_dresidual: bool) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Return the gradients of x, residual, weight and bias, each None where there is nothing to differentiate."""
    if torch.is_grad_enabled():
        return differentiable(ctx, dy)
    x, weight, bias, moments, bits = ctx.saved_tensors
    by_batch, eps, number, slope, added = ctx.how
    active = number != 0
    dx, dresidual, dweight, dbias = _BACKWARD(
        native.same_layout(dy, x),
        x,
        None,
        moments,
        weight,
        bias,
        bits if active and added else None,
        by_batch,
        eps,
        number,
        slope,
        want_dx,
        want_dresidual and active,
    )
    return (
        dx if want_dx else None,
        (dresidual if active else dy) if want_dresidual else None,
        _as(dweight, weight),
        _as(dbias, bias),
    )


def differentiable(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Return the gradients made of operations that can be differentiated again, for a second derivative.

    The context has what `_Train` keeps in it: x, weight, bias, moments and bits; how the output was made.
    """
    x, weight, bias, moments, bits = ctx.saved_tensors
    by_batch, eps, number, _, added = ctx.how
    through = dy if number == 0 else dy * _passed(ctx, x, weight, bias, moments, bits)
    if by_batch:
        dx, dweight, dbias = batch_norm_backward(through, x, weight, eps)
    else:
        inv_std = (moments[1] + eps).rsqrt()
        scale = inv_std if weight is None else inv_std * widened(weight)
        x_hat = (widened(x) - per_channel(moments[0], x)) * per_channel(inv_std, x)
        dx = (widened(through) * per_channel(scale, x)).to(x.dtype)
        dweight, dbias = channel_sum(widened(through) * x_hat), channel_sum(widened(through))
    return dx, through if added else None, _as(dweight, weight), _as(dbias, bias)


@torch.no_grad()
def _passed(
    ctx: Any,  # noqa: ANN401
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    bits: Tensor,
) -> Tensor:
    """Return the derivative of the activation at every element: 1, or the slope below 0."""
    if ctx.how[4]:
        ones = torch.ones_like(x)
        arguments = (ones, x, None, moments, weight, bias, bits, *ctx.how[:4], False, True)
        found: Tensor = _BACKWARD(*arguments)[1]
        return found
    y = normalize(widened(x), moments[0], moments[1], weight, bias, ctx.how[1])
    return torch.where(y <= 0, ctx.how[3], 1.0).to(x.dtype)


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def in_dtype_of(values: Tensor, parameter: Tensor | None) -> Tensor:
    """Return values in the dtype of a parameter, or as they are where there is none."""
    return values if parameter is None or values.dtype == parameter.dtype else values.to(parameter.dtype)


def _as(values: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else in_dtype_of(values, parameter)


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return what applies a function without looking for transforms of torch.func again: `fuses` has looked."""
    found: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return found


_APPLY_TRAIN, _APPLY_EVAL, _APPLY_SCALE = _applied(_Train), _applied(_Eval), _applied(_Scale)
