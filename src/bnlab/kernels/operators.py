"""The operators, registered with torch.library so that compilers and exporters see one node.

`bnlab::batch_norm_train` is functional: it changes nothing, and running statistics are updated outside. With fixed
statistics BN is a scale and a shift, made of ordinary torch operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.functional import renorm
from bnlab.functional.folding import scale_and_shift
from bnlab.functional.moments import per_channel, widened
from bnlab.functional.transform import batch_norm_backward
from bnlab.kernels.backends import reference
from bnlab.kernels.dispatch import BACKENDS, Request, choose

__all__ = ["batch_norm_eval", "batch_norm_train", "is_transformed", "renorm_correction", "with_strides_of"]

torch.library.define(
    "bnlab::batch_norm_train",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, float eps) -> (Tensor y, Tensor mean, Tensor var)",
)
torch.library.define(
    "bnlab::batch_norm_train_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? mask, Tensor mean, Tensor var, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
torch.library.define(
    "bnlab::renorm_correction",
    "(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, Tensor limits, float eps)"
    " -> (Tensor r, Tensor d)",
)


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
    if is_transformed():
        y, mean, var = reference.forward(x, weight, bias, mask, eps)
        return y, mean.detach(), var.detach()
    y, mean, var = torch.ops.bnlab.batch_norm_train(x, weight, bias, mask, eps)
    return y, mean, var


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active, which want plain formulas."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001


def batch_norm_eval(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise with fixed statistics: a scale and a shift, formed in float64.

    (x - K) a + b' with K = mean rounded to the dtype of the arithmetic: x - K does not round near the mean, as
    a x + (b - a mean) does. With parameters that need no gradient nothing of the size of `x` is kept for backward.

    An exporter sees torch's own operator, which every consumer knows.

    Args:
        x: Shape (N, C, *spatial); any float dtype and layout.
        mean: Shape (C,).
        var: Shape (C,).
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        eps: Added to the variance.

    Returns:
        Shape, dtype and layout of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        mean, var = mean.to(dtype), var.to(dtype)
        weight, bias = (None if values is None else values.to(dtype) for values in (weight, bias))
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    pivot = mean.to(dtype)
    scale, _ = scale_and_shift(mean, var, weight, None, eps)
    shift = (pivot - widened(mean)) * scale
    shift = shift if bias is None else shift + bias
    scale, shift = per_channel(scale.to(dtype), x), per_channel(shift.to(dtype), x)
    return torch.addcmul(shift, x.to(dtype) - per_channel(pivot, x), scale).to(x.dtype)


def renorm_correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return r and d as `functional.renorm_correction`, without gradient.

    One node to a compiler: of ordinary operations it would save the running statistics for the backward pass and
    compute r and d again there, from the values that the forward pass has moved on meanwhile.
    """
    with torch.no_grad():
        if is_transformed():
            return renorm.renorm_correction(mean, var, running_mean, running_var, limits, eps)
        r, d = torch.ops.bnlab.renorm_correction(mean, var, running_mean, running_var, limits, eps)
    return r, d


@torch.library.impl("bnlab::renorm_correction", "default")
def _renorm_correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return renorm.renorm_correction(mean, var, running_mean, running_var, limits, eps)


@torch.library.register_fake("bnlab::renorm_correction")  # type: ignore[untyped-decorator]
def _fake_renorm_correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def with_strides_of(x: Tensor, values: Tensor) -> Tensor:
    """Give values the strides that the fake kernel promises, and a storage of their own."""
    promised = torch.empty_like(x)
    ready = values.stride() == promised.stride() and not values._is_view()  # noqa: SLF001 - autograd asks the same
    return values if ready else promised.copy_(values)


@torch.library.impl("bnlab::batch_norm_train", "default")
def _train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = BACKENDS[choose(Request.of(x, mask)).name]
    y, mean, var = backend.forward(x, weight, bias, mask, eps)
    return with_strides_of(x, y), mean, var


@torch.library.impl("bnlab::batch_norm_train_backward", "default")
def _train_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = BACKENDS[choose(Request.of(x, mask)).name]
    dx, dweight, dbias = backend.backward(grad, x, weight, mask, mean, var, eps)
    dtype = _parameter_dtype(x, weight)
    return with_strides_of(x, dx), dweight.to(dtype), dbias.to(dtype)


def _parameter_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else weight.dtype


@torch.library.register_fake("bnlab::batch_norm_train")  # type: ignore[untyped-decorator]
def _fake_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.size(1), dtype=torch.float64)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.register_fake("bnlab::batch_norm_train_backward")  # type: ignore[untyped-decorator]
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
        # A second derivative is wanted: the statistics depend on x, so they are part of what is differentiated.
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


torch.library.register_autograd("bnlab::batch_norm_train", _autograd, setup_context=_setup_context)
