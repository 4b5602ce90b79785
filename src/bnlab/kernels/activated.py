"""BN with what follows it as one operator of torch.library, for compilers: what `fused` is in eager mode.

A compiler that is given BN and a ReLU keeps a mask of bool for the ReLU's gradient, which it writes one byte after the
other; the operator computes the mask again, or keeps one bit an element where a residual was added.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnlab.kernels import native
from bnlab.kernels.eager import ACTIVATIONS, differentiable, in_dtype_of
from bnlab.kernels.operators import with_strides_of

__all__ = ["batch_norm_activated_train", "is_one_operator"]

_AVAILABLE = native.unavailable() is None
_TRAIN, _, _BACKWARD = native.operators()
_DTYPES = frozenset(native.DTYPES)

torch.library.define(
    "bnlab::batch_norm_activated_train",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, int activation, float slope)"
    " -> (Tensor y, Tensor moments, Tensor bits)",
)
torch.library.define(
    "bnlab::batch_norm_activated_train_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor moments, Tensor bits, bool added, float eps,"
    " int activation, float slope) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
)


def is_one_operator(x: Tensor, residual: Tensor | None, activation: str | None) -> bool:
    """Whether a compiler is tracing what the operator can do.

    An exporter is given operators that every consumer knows.
    """
    return (
        _AVAILABLE
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and activation is not None
        and activation in ACTIVATIONS
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
    )


def batch_norm_activated_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return activation(BN(x) + residual) with the statistics of the batch.

    Args:
        x: Shape (N, C, *spatial); float32, bfloat16 or float16 on the CPU.
        residual: Shape and dtype of `x`, or None.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        eps: Added to the variance.
        activation: Key of `ACTIVATIONS`.

    Returns:
        y: Shape, dtype and layout of `x`; differentiable to any order.
        mean: Shape (C,), float64; not differentiable.
        var: Biased. Shape (C,), float64; not differentiable.
    """
    y, moments, _ = torch.ops.bnlab.batch_norm_activated_train(x, residual, weight, bias, eps, *ACTIVATIONS[activation])
    return y, moments[0], moments[1]


def _room(x: Tensor, added: bool) -> int:
    """Return the size of the bits: at least what the kernels write, by a formula that holds for symbolic sizes too.

    At most 1.5 times the channels (a group of small planes that is not full), each with its bits in whole 16, or rows
    of at least 256 elements with the channels last, the last of which is not full.
    """
    if not added:
        return 0
    channels, positions = x.size(1), math.prod(x.shape[2:])
    return x.size(0) * (channels + channels // 2 + 1) * ((positions + 15) // 16 * 2) + 4 * channels + 64


@torch.library.impl("bnlab::batch_norm_activated_train", "cpu")
def _train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    added = residual is not None
    x = native.dense(x)
    residual = None if residual is None else native.same_layout(residual, x)
    y, moments, bits, _ = _TRAIN(
        x, residual, weight, bias, None, None, None, None, 0.0, eps, activation, slope, False, added, _room(x, added)
    )
    return with_strides_of(x, y), moments, bits


@torch.library.impl("bnlab::batch_norm_activated_train_backward", "cpu")
def _train_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    bits: Tensor,
    added: bool,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = native.dense(x)
    dx, dresidual, dweight, dbias = _BACKWARD(
        native.same_layout(grad, dense),
        dense,
        None,
        moments,
        weight,
        bias,
        bits if added else None,
        True,
        eps,
        activation,
        slope,
        True,
        added,
    )
    dresidual = with_strides_of(x, dresidual) if added else dresidual
    return with_strides_of(x, dx), dresidual, in_dtype_of(dweight, weight), in_dtype_of(dbias, bias)


@torch.library.register_fake("bnlab::batch_norm_activated_train")  # type: ignore[untyped-decorator]
def _fake_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty((2, x.size(1)), dtype=torch.float64)
    return torch.empty_like(x), moments, x.new_empty(_room(x, residual is not None), dtype=torch.uint8)


@torch.library.register_fake("bnlab::batch_norm_activated_train_backward")  # type: ignore[untyped-decorator]
def _fake_train_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    bits: Tensor,
    added: bool,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = torch.empty_like(x) if added else x.new_empty(0)
    dweight, dbias = (
        x.new_empty(x.size(1), dtype=torch.float32 if parameter is None else parameter.dtype)
        for parameter in (weight, bias)
    )
    return torch.empty_like(x), dresidual, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, eps, activation, slope = inputs
    _, moments, bits = output
    ctx.mark_non_differentiable(moments, bits)
    ctx.save_for_backward(x, weight, bias, moments, bits)
    ctx.how = (True, eps, activation, slope, residual is not None)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return *differentiable(ctx, grad), None, None, None
    x, weight, bias, moments, bits = ctx.saved_tensors
    _, eps, activation, slope, added = ctx.how
    dx, dresidual, dweight, dbias = torch.ops.bnlab.batch_norm_activated_train_backward(
        grad, x, weight, bias, moments, bits, added, eps, activation, slope
    )
    return (
        dx,
        dresidual if added else None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        None,
        None,
    )


torch.library.register_autograd("bnlab::batch_norm_activated_train", _autograd, setup_context=_setup_context)
