"""The operators of the GPU kernels, with the arguments and results of `bnlab.kernels.native.calls`.

Nothing here waits for the device. A batch is normalised in one launch if the tiles of a channel group fit into
registers, and in two launches otherwise, or three where a channel has many parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.errors import UsageError
from bnlab.kernels.backends.triton import availability
from bnlab.kernels.backends.triton.geometry import Geometry, geometry_of
from bnlab.kernels.backends.triton.launching import on_device_of
from bnlab.kernels.backends.triton.one_launch import backward_at_once, train_at_once
from bnlab.kernels.backends.triton.tensors import ForwardTensors, Gradients, IncomingTensors, Update
from bnlab.kernels.backends.triton.two_launches import (
    backward_in_two,
    backward_of_fixed,
    normalise_with,
    statistics_of,
    train_in_two,
)
from bnlab.kernels.form import Form, Running

__all__ = ["apply", "backward", "statistics", "train"]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "skipped_batches")


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

    For arguments and results see :func:`bnlab.kernels.native.calls.train`. The status is always 0: the device alone
    knows whether the batch was skipped.
    """
    geometry = _geometry(x)
    y, moments = torch.empty_like(x), _moments(x)
    bits = _bits(x, geometry, want_bits and residual is not None, room)
    if not geometry.elements:
        return y, moments.zero_(), bits, 0
    dense = Running(*(_vector(name, values, x) for name, values in zip(_BUFFERS, running, strict=True)))
    tensors = _forward_tensors(x, residual, y, bits, weight, bias, moments)
    update = Update(dense, momentum, skip_nonfinite)
    with on_device_of(x):
        if not train_at_once(geometry, tensors, update, form):
            train_in_two(geometry, tensors, update, form)
    for buffer, changed in zip(running, dense, strict=True):
        if buffer is not None and changed is not None and changed is not buffer:
            buffer.copy_(changed)
    return y, moments, bits, 0


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
    """Normalise with fixed statistics. For arguments and results see :func:`bnlab.kernels.native.calls.apply`."""
    geometry = _geometry(x)
    y, moments = torch.empty_like(x), _moments(x)
    bits = _bits(x, geometry, want_bits and residual is not None, 0)
    if not geometry.elements:
        return y, torch.stack([mean.double(), var.double()], out=moments), bits
    tensors = _forward_tensors(x, residual, y, bits, weight, bias, moments)
    fixed = (_vector("running_mean", mean, x), _vector("running_var", var, x))
    with on_device_of(x):
        normalise_with(*fixed, geometry, tensors, form)
    return y, moments, bits


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
    """Return the gradients of x, residual, weight and bias.

    For arguments and results see :func:`bnlab.kernels.native.calls.backward`.
    """
    geometry = _geometry(x)
    dx = torch.empty_like(x) if want_dx else None
    dresidual = torch.empty_like(x) if want_dresidual and form.activation else None
    make = torch.empty if geometry.elements else torch.zeros
    dweight, dbias = (
        make(geometry.channels, dtype=_gradient_dtype(parameter), device=x.device) for parameter in (weight, bias)
    )
    results = Gradients(dx, dresidual, dweight, dbias)
    if geometry.elements:
        parameters = (_vector("weight", weight, x), _vector("bias", bias, x))
        tensors = IncomingTensors(dy, x, bits, weights, moments.contiguous(), *parameters)
        with on_device_of(x):
            if not form.by_batch:
                backward_of_fixed(geometry, tensors, results, form)
            elif weights is not None or not backward_at_once(geometry, tensors, results, form):
                backward_in_two(geometry, tensors, results, form)
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, nothing if dresidual is None else dresidual, dweight, dbias


def statistics(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, shape (2, C), float64, and the sum of the weights, shape (), float64.

    Args:
        x: Shape (N, C, *spatial), dense, of one of `native.DTYPES`.
        weights: Weight of every position, shape (N, positions), float32, or None.
    """
    geometry = _geometry(x)
    moments, total = _moments(x), torch.zeros((), dtype=torch.float64, device=x.device)
    if not geometry.elements:
        return moments.zero_(), total
    with on_device_of(x):
        statistics_of(geometry, x, weights, moments, total)
    return moments, total


def _geometry(x: Tensor) -> Geometry:
    return geometry_of(x, availability.machine_of(x.device).tile)


def _forward_tensors(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    bits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
) -> ForwardTensors:
    kept = bits if bits.numel() else None
    return ForwardTensors(x, residual, y, kept, _vector("weight", weight, x), _vector("bias", bias, x), moments)


def _vector(name: str, values: Tensor | None, x: Tensor) -> Tensor | None:
    """Return values as the kernels read them, side by side in memory, on the device of the input.

    Raises:
        UsageError: If they lie on another device.
    """
    if values is None:
        return None
    if values.get_device() != x.get_device():
        rule = f"{name} must be on {x.device} as the input is, got {values.device}"
        raise UsageError(f"batch norm: {rule}. Move the layer: layer.to({str(x.device)!r}).")
    return values if values.is_contiguous() else values.contiguous()


def _moments(x: Tensor) -> Tensor:
    return torch.empty((2, x.size(1)), dtype=torch.float64, device=x.device)


def _bits(x: Tensor, geometry: Geometry, wanted: bool, room: int) -> Tensor:
    size = max(room, geometry.bytes_for_bits) if wanted else 0
    make = torch.zeros if size > geometry.bytes_for_bits else torch.empty  # bytes that no kernel writes are 0
    return make(size, dtype=torch.uint8, device=x.device)


def _gradient_dtype(parameter: Tensor | None) -> torch.dtype:
    return torch.float32 if parameter is None else parameter.dtype
