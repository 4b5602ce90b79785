"""BN with a residual and an activation as one node of the autograd graph, in eager mode.

One operator normalises, adds the residual, applies the activation and updates the running statistics. `dispatch`
decides when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnlab.functional.moments import channel_sum, per_channel, widened
from bnlab.functional.transform import batch_norm_backward, normalize
from bnlab.kernels.calls import calls_of
from bnlab.kernels.dense import same_layout
from bnlab.kernels.fixed_statistics import batch_norm_eval
from bnlab.kernels.form import Form, Running, form_of

__all__ = ["differentiable", "eval_in_one_kernel", "in_dtype_of", "train_in_one_kernel"]


def train_in_one_kernel(
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
    """Return activation(BN(x) + residual) with batch statistics, and the status of the running-statistics update.

    Args:
        x: Shape (N, C, *spatial), at least 2 values per channel.
        residual: Shape, dtype and strides of `x`, or None.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        running: The buffers to update.
        momentum: Weight of the new batch; None stands for 1/batches.
        eps: Added to the variance.
        activation: An activation that the kernels support, or None.
        skip_nonfinite: Whether a batch with an inf or NaN leaves the running statistics and their counter unchanged.

    Returns:
        y: Shape, dtype and strides of `x`; differentiable to any order.
        status: `calls.SATURATED`, 0, or the status of a skipped batch.
    """
    form = form_of(True, eps, activation, residual is not None)
    rate = -1.0 if momentum is None else momentum
    if torch.is_grad_enabled():
        result: tuple[Tensor, int] = _APPLY_TRAIN(x, residual, weight, bias, running, rate, form, skip_nonfinite)
        return result
    y, _, _, status = calls_of(x).train(
        x, residual, weight, bias, form, running=running, momentum=rate, skip_nonfinite=skip_nonfinite
    )
    return y, status


def eval_in_one_kernel(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Return activation(BN(x) + residual) with fixed statistics. For arguments see :func:`train_in_one_kernel`."""
    form = form_of(False, eps, activation, residual is not None)
    if not torch.is_grad_enabled():
        return calls_of(x).apply(x, residual, mean, var, weight, bias, form)[0]
    is_scale = form.activation == 0 and not (_trains(weight) or _trains(bias))
    function = _APPLY_SCALE if is_scale else _APPLY_EVAL
    result: Tensor = function(x, residual, mean, var, weight, bias, form)
    return result


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
        form: Form,
        skip_nonfinite: bool,
    ) -> tuple[Tensor, int]:
        y, moments, bits, status = calls_of(x).train(
            x,
            residual,
            weight,
            bias,
            form,
            running=running,
            momentum=momentum,
            skip_nonfinite=skip_nonfinite,
            want_bits=True,
        )
        ctx.save_for_backward(x, weight, bias, moments, bits if form.has_bits else None)
        ctx.form = form
        return y, status

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        wants = ctx.needs_input_grad
        dx, dresidual, dweight, dbias = _gradients(ctx, dy, wants[0], wants[1])
        return dx, dresidual, dweight, dbias, None, None, None, None


class _Eval(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
    ) -> Tensor:
        y, moments, bits = calls_of(x).apply(x, residual, mean, var, weight, bias, form, want_bits=True)
        ctx.save_for_backward(x, weight, bias, moments, bits if form.has_bits else None)
        ctx.form = form
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        wants = ctx.needs_input_grad
        dx, dresidual, dweight, dbias = _gradients(ctx, dy, wants[0], wants[1])
        return dx, dresidual, None, None, dweight, dbias, None


class _Scale(torch.autograd.Function):
    """Eval mode without trainable parameters: the gradient needs no tensor of the size of the input."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
    ) -> Tensor:
        y, moments, _ = calls_of(x).apply(x, residual, mean, var, weight, bias, form)
        ctx.save_for_backward(moments[1].clone(), weight)
        ctx.eps = form.eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        var, weight = ctx.saved_tensors
        dresidual = dy if ctx.needs_input_grad[1] else None
        dx = batch_norm_eval(dy, torch.zeros_like(var), var, weight, None, ctx.eps)
        return dx, dresidual, None, None, None, None, None


def _gradients(ctx: Any, dy: Tensor, want_dx: bool, want_dresidual: bool) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Return the gradients of x, residual, weight and bias, each None where there is nothing to differentiate.

    The gradients of the parameters keep the dtype of the kernel. Autograd rounds them to the dtype of the parameter.
    """
    form: Form = ctx.form
    if torch.is_grad_enabled():
        return differentiable(form, ctx.saved_tensors, dy)
    x, weight, bias, moments, bits = ctx.saved_tensors
    active = form.activation != 0
    dx, dresidual, dweight, dbias = calls_of(x).backward(
        same_layout(dy, x),
        x,
        moments,
        weight,
        bias,
        form,
        bits=bits,
        want_dx=want_dx,
        want_dresidual=want_dresidual and active,
    )
    return (
        dx if want_dx else None,
        (dresidual if active else dy) if want_dresidual else None,
        None if weight is None else dweight,
        None if bias is None else dbias,
    )


def differentiable(form: Form, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients by differentiable operations, for a second derivative.

    Args:
        form: The form of the forward pass.
        saved: x, weight, bias, moments and bits of the forward pass, each None where the forward pass had none.
        dy: The gradient of the output.
    """
    x, weight, bias, moments, bits = saved
    through = dy if form.activation == 0 else dy * _activation_derivative(form, x, weight, bias, moments, bits)
    if form.by_batch:
        dx, dweight, dbias = batch_norm_backward(through, x, weight, form.eps)
    else:
        inv_std = (moments[1] + form.eps).rsqrt()
        scale = inv_std if weight is None else inv_std * widened(weight)
        x_hat = (widened(x) - per_channel(moments[0], x)) * per_channel(inv_std, x)
        dx = (widened(through) * per_channel(scale, x)).to(x.dtype)
        dweight, dbias = channel_sum(widened(through) * x_hat), channel_sum(widened(through))
    return dx, through if form.added else None, _gradient_for(dweight, weight), _gradient_for(dbias, bias)


@torch.no_grad()
def _activation_derivative(
    form: Form, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, bits: Tensor | None
) -> Tensor:
    """Return the derivative of the activation at every element: 1, or the slope below 0."""
    if form.added:
        ones = torch.ones_like(x)
        return calls_of(x).backward(
            ones, x, moments, weight, bias, form, bits=bits, want_dx=False, want_dresidual=True
        )[1]
    y = normalize(widened(x), moments[0], moments[1], weight, bias, form.eps)
    return torch.where(y <= 0, form.slope, 1.0).to(x.dtype)


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def in_dtype_of(values: Tensor, parameter: Tensor | None) -> Tensor:
    """Return values in the dtype of a parameter, or unchanged if there is no parameter."""
    return values if parameter is None or values.dtype == parameter.dtype else values.to(parameter.dtype)


def _gradient_for(values: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else in_dtype_of(values, parameter)


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the `apply` of a function without its test for torch.func: the request has made this test already."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


_APPLY_TRAIN, _APPLY_EVAL, _APPLY_SCALE = _applied(_Train), _applied(_Eval), _applied(_Scale)
