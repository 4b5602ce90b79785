"""BN with a residual and an activation as one operator of torch.library, for compilers.

It is the counterpart of `bnlab.kernels.eager`. For BN and a ReLU as separate operators, a compiler keeps a mask of bool
for the gradient of the ReLU and writes it byte by byte. This operator computes the mask again, or keeps one bit per
element where a residual was added.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from bnlab.kernels.calls import calls_of
from bnlab.kernels.compiled.strides import with_strides_of
from bnlab.kernels.dense import dense, same_layout
from bnlab.kernels.eager import differentiable, in_dtype_of
from bnlab.kernels.form import Form, kernel_of
from bnlab.kernels.registration import define

__all__ = ["batch_norm_activated_train", "register"]

_DEVICES = ("cpu", "cuda", "xpu")
"""The types of devices for which there are kernels."""


def register(library: Library) -> None:
    """Register the operators of this module."""
    define(
        library,
        "bnlab::batch_norm_activated_train",
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, int activation, float slope)"
        " -> (Tensor y, Tensor moments, Tensor bits)",
        _train,
        _fake_train,
        device=_DEVICES,
    )
    define(
        library,
        "bnlab::batch_norm_activated_train_backward",
        "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor moments, Tensor bits, bool added, float eps,"
        " int activation, float slope) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
        _train_backward,
        _fake_train_backward,
        device=_DEVICES,
    )
    torch.library.register_autograd(
        "bnlab::batch_norm_activated_train", _autograd, setup_context=_setup_context, lib=library
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
        x: Shape (N, C, *spatial); float32, bfloat16 or float16.
        residual: Shape and dtype of `x`, or None.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        eps: Added to the variance.
        activation: An activation that the kernels support.

    Returns:
        y: Shape, dtype and layout of `x`; differentiable to any order.
        mean: Shape (C,), float64; not differentiable.
        var: Biased. Shape (C,), float64; not differentiable.
    """
    y, moments, _ = torch.ops.bnlab.batch_norm_activated_train(x, residual, weight, bias, eps, *kernel_of(activation))
    return y, moments[0], moments[1]


def _room(x: Tensor, added: bool) -> int:
    """Return the size of the bits in bytes. It is at least what the kernels write, also for symbolic sizes.

    The CPU kernels write at most 1.5 times the channels (if a group of small planes is not full), each with its bits
    rounded up to a multiple of 16. In channels_last they write rows of at least 256 elements, and the last row may not
    be full. The GPU kernels write whole bytes for every plane, or for every position in channels_last.
    """
    if not added:
        return 0
    samples, channels, positions = x.size(0), x.size(1), math.prod(x.shape[2:])
    if x.device.type != "cpu":
        return samples * torch.sym_max(channels * ((positions + 7) // 8), positions * ((channels + 7) // 8))  # type: ignore[no-any-return,no-untyped-call]
    return samples * (channels + channels // 2 + 1) * ((positions + 15) // 16 * 2) + 4 * channels + 64


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
    x = dense(x)
    residual = None if residual is None else same_layout(residual, x)
    form = Form(True, eps, activation, slope, added)
    y, moments, bits, _ = calls_of(x).train(x, residual, weight, bias, form, want_bits=added, room=_room(x, added))
    return with_strides_of(x, y), moments, bits


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
    values = dense(x)
    dx, dresidual, dweight, dbias = calls_of(x).backward(
        same_layout(grad, values),
        values,
        moments,
        weight,
        bias,
        Form(True, eps, activation, slope, added),
        bits=bits if added else None,
        want_dresidual=added,
    )
    dresidual = with_strides_of(x, dresidual) if added else dresidual
    return with_strides_of(x, dx), dresidual, in_dtype_of(dweight, weight), in_dtype_of(dbias, bias)


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
    ctx.form = Form(True, eps, activation, slope, residual is not None)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    form: Form = ctx.form
    if torch.is_grad_enabled():
        return *differentiable(form, ctx.saved_tensors, grad), None, None, None
    x, weight, bias, moments, bits = ctx.saved_tensors
    dx, dresidual, dweight, dbias = torch.ops.bnlab.batch_norm_activated_train_backward(
        grad, x, weight, bias, moments, bits, form.added, form.eps, form.activation, form.slope
    )
    return (
        dx,
        dresidual if form.added else None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        None,
        None,
    )
