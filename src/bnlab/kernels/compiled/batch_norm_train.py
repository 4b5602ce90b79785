"""`bnlab::batch_norm_train`: BN with batch statistics as one operator, which chooses its backend.

The operator is functional: it changes none of its arguments, and its caller updates the running statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from bnlab.functional.transform import batch_norm_backward
from bnlab.kernels.backends import reference
from bnlab.kernels.compiled.sharding import is_sharded, register_shardings
from bnlab.kernels.compiled.strides import with_strides_of
from bnlab.kernels.dispatch import BACKENDS, choose
from bnlab.kernels.registration import define
from bnlab.kernels.request import Request, context_of, needs_formulas

__all__ = ["batch_norm_train", "register"]


def register(library: Library) -> None:
    """Register the operators of this module."""
    define(
        library,
        "bnlab::batch_norm_train",
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, float eps) -> (Tensor y, Tensor mean, Tensor var)",
        _train,
        _fake_train,
    )
    define(
        library,
        "bnlab::batch_norm_train_backward",
        "(Tensor grad, Tensor x, Tensor? weight, Tensor? mask, Tensor mean, Tensor var, float eps)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        _train_backward,
        _fake_train_backward,
    )
    torch.library.register_autograd("bnlab::batch_norm_train", _autograd, setup_context=_setup_context, lib=library)


def batch_norm_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the statistics of the batch.

    Args:
        x: Shape (N, C, *spatial); any float dtype and layout.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        mask: Weights that broadcast to (N, 1, *spatial), or None.
        eps: Added to the variance.

    Returns:
        y: Shape, dtype and layout of `x`; differentiable to any order.
        mean: Shape (C,), float64; not differentiable.
        var: Biased. Shape (C,), float64; not differentiable.
    """
    if needs_formulas():
        y, mean, var = reference.forward(x, weight, bias, mask, eps)
        return y, mean.detach(), var.detach()
    if context_of(x) == "subclass" and is_sharded(x):
        register_shardings()
    y, mean, var = torch.ops.bnlab.batch_norm_train(x, weight, bias, mask, eps)
    return y, mean, var


def _train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = BACKENDS[choose(Request.of(x, mask)).name]
    y, mean, var = backend.forward(x, weight, bias, mask, eps)
    return with_strides_of(x, y), mean, var


def _train_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = BACKENDS[choose(Request.of(x, mask)).name]
    dx, dweight, dbias = backend.backward(grad, x, weight, mask, mean, var, eps)
    dtype = _parameter_dtype(x, weight)
    return with_strides_of(x, dx), dweight.to(dtype), dbias.to(dtype)


def _parameter_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else weight.dtype


def _fake_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.size(1), dtype=torch.float64)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_train_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(x.size(1), dtype=_parameter_dtype(x, weight))
    return torch.empty_like(x), dweight, torch.empty_like(dweight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, mask, eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mask, mean, var)
    ctx.eps = eps


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, mask, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():
        # The caller wants a second derivative. The statistics depend on x, so autograd must differentiate them too.
        dx, dweight, dbias = batch_norm_backward(grad, x, weight, ctx.eps, mask=mask)
    else:
        dx, dweight, dbias = torch.ops.bnlab.batch_norm_train_backward(grad, x, weight, mask, mean, var, ctx.eps)
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
    )
