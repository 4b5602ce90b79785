"""Batches that are made on the CPU, the layers that take them, and what float64 on the CPU makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tests import oracle
from torch import Tensor, nn

import bnlab

EPS = 1e-5
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}
"""The slope below 0 of every activation that the kernels support."""

SHAPES = {
    "n-c": (64, 5),
    "long n-c": (4096, 100),
    "n-c-l": (16, 5, 9),
    "2d": (8, 5, 7, 9),
    "3d": (4, 5, 3, 4, 5),
    "one channel": (8, 1, 33, 17),
    "one position": (2, 3, 49, 1),
    "7 by 7": (4, 96, 7, 7),
    "14 by 14": (3, 40, 14, 14),
    "28 by 28": (2, 64, 28, 28),
    "112 by 112": (2, 16, 112, 112),
    "3000 channels": (8, 3000),
    "2048 channels": (2, 2048, 7, 7),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def laid_out(values: Tensor, layout: str, device: torch.device) -> Tensor:
    """Move values to a device, in a layout of `oracle.LAYOUTS`."""
    return oracle.LAYOUTS[layout](values.to(device))


@dataclass(frozen=True)
class Batch:
    """An input with all that a layer may take beside it, on the CPU.

    `grad` is the gradient of the output. It is 0 where the sign of the output hangs on rounding.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    residual: Tensor | None = None
    mask: Tensor | None = None

    def rank(self) -> int:
        return max(1, self.x.dim() - 2)


def batch_of(shape, dtype, *, ratio=0.0, residual=False, masked=False, seed=0) -> Batch:
    """Return a batch whose values have a mean of `ratio` standard deviations."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes):
        return torch.randn(sizes, generator=generator)

    x = (ratio + random(*shape)).to(dtype)
    weight, bias = random(2, shape[1])
    grad = random(*shape).to(dtype)
    added = random(*shape).to(dtype) if residual else None
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator).round() if masked else None
    return Batch(x, weight, bias, grad, added, mask)


@dataclass(frozen=True)
class Expected:
    """What a layer must return, in float64."""

    y: Tensor
    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor
    dbias: Tensor
    mean: Tensor
    var: Tensor
    count: float


def expected_of(batch: Batch, activation=None, statistics=None) -> tuple[Batch, Expected]:
    """Return a batch whose `grad` is 0 where rounding decides the sign of the output, and what float64 gives for it.

    `statistics` are the mean and variance of eval mode; None stands for train mode.
    """
    x, weight, bias = (t.double().requires_grad_() for t in (batch.x.clone(), batch.weight.clone(), batch.bias.clone()))
    residual = None if batch.residual is None else batch.residual.double().requires_grad_()
    weights = torch.ones_like(x[:, :1]) if batch.mask is None else batch.mask.double().expand_as(x[:, :1])
    mean, var, count = moments_of(x, weights)
    used = (mean, var) if statistics is None else statistics
    shape = (1, -1, *[1] * (x.dim() - 2))
    normalized = (x - used[0].view(shape)) / (used[1].view(shape) + EPS).sqrt() * weight.view(shape) + bias.view(shape)
    y = normalized if residual is None else normalized + residual
    grad = batch.grad
    if activation is not None:
        rounding = torch.finfo(grad.dtype).eps * normalized.detach().abs() + 1e-4
        grad = torch.where(y.detach().abs() < rounding, 0, grad)
        y = torch.where(y <= 0, SLOPES[activation] * y, y)
    leaves = [x, weight, bias] + ([] if residual is None else [residual])
    dx, dweight, dbias, *dresidual = torch.autograd.grad(y, leaves, grad.double())
    return replace(batch, grad=grad), Expected(
        y.detach(), dx, dresidual[0] if dresidual else None, dweight, dbias, mean.detach(), var.detach(), count
    )


def moments_of(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the mean, the biased variance and the count of every channel, in two passes."""
    dims = (0, *range(2, x.dim()))
    count = float(weights.sum())
    mean = (weights * x).sum(dims, keepdim=True) / count
    var = (weights * (x - mean).square()).sum(dims) / count
    return mean.flatten(), var, count


def layer_for(batch: Batch, device: torch.device, **options) -> nn.Module:
    """Return the layer for a batch, with its weight and bias, on a device."""
    layer = getattr(bnlab.nn, f"BatchNorm{batch.rank()}d")(batch.x.size(1), eps=EPS, **options)
    with torch.no_grad():
        layer.weight.copy_(batch.weight)
        layer.bias.copy_(batch.bias)
    return layer.to(device)


@dataclass(frozen=True)
class Results:
    """What a layer returned, on its device."""

    y: Tensor
    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor
    dbias: Tensor

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.y, self.dx, self.dresidual, self.dweight, self.dbias) if t is not None]


def run(layer: nn.Module, batch: Batch, layout: str, device: torch.device) -> Results:
    """Run a layer forward and backward."""
    x = laid_out(batch.x, layout, device).detach().requires_grad_()
    residual = None if batch.residual is None else laid_out(batch.residual, layout, device).detach().requires_grad_()
    mask = None if batch.mask is None else batch.mask.to(device)
    y = layer(x, residual, mask=mask)
    layer.zero_grad()
    y.backward(laid_out(batch.grad, layout, device))
    return Results(y.detach(), x.grad, None if residual is None else residual.grad, layer.weight.grad, layer.bias.grad)


def assert_right(results: Results, expected: Expected, batch: Batch, *, in_one_kernel: bool = True) -> None:
    """Assert that the output is within 4 eps, and the gradients within what their sums round to.

    Operators of torch round the gradient of an activation to the dtype of the batch, before the sums.
    """
    dtype = batch.x.dtype
    assert {t.dtype for t in (results.y, results.dx)} == {dtype}
    assert oracle.error_in_eps(results.y.cpu(), expected.y.numpy()) <= 4
    assert_near(results.dx, expected.dx, 16 * torch.finfo(dtype).eps)
    if expected.dresidual is not None:
        assert_near(results.dresidual, expected.dresidual, 2 * torch.finfo(dtype).eps)
    dims = [0, *range(2, batch.x.dim())]
    scale = float(batch.grad.double().abs().sum(dims).max())
    scale *= torch.finfo(torch.float32 if in_one_kernel else dtype).eps
    assert float((results.dweight.cpu().double() - expected.dweight).abs().max()) <= 40 * scale
    assert float((results.dbias.cpu().double() - expected.dbias).abs().max()) <= 4 * scale


def assert_near(values: Tensor, expected: Tensor, relative: float) -> None:
    """Assert that values differ by at most a share of the largest one."""
    error = float((values.cpu().double() - expected).abs().max())
    assert error <= relative * float(expected.abs().max()), error


def assert_moved(layer: nn.Module, expected: Expected, momentum: float) -> None:
    """Assert that the running statistics moved once from 0 and 1, by the unbiased variance."""
    mean, var = layer.running_mean.cpu().double(), layer.running_var.cpu().double()
    unbiased = expected.var * expected.count / (expected.count - 1)
    std = expected.var.sqrt() + 1e-12
    assert float(((mean - momentum * expected.mean).abs() / (std + expected.mean.abs())).max()) <= 1e-6
    assert float(((var - (1 - momentum) - momentum * unbiased).abs() / (1 + unbiased)).max()) <= 1e-6
