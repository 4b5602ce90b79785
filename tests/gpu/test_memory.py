"""What a forward and backward pass allocates, and tensors with more elements than 32 bits count."""

from __future__ import annotations

import gc

import pytest
import torch
from tests.gpu import hardware as gpu
from tests.gpu.cases import assert_near
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bnlab

pytestmark = pytest.mark.usefixtures("hardware")

SHAPE = (32, 256, 56, 56)
SAMPLES, CHANNELS, SIDE = 33, 1024, 256
"""In bfloat16 an input of this size takes 4.4 GB, and has more than 2**31 elements."""

formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def step_of(function, device, dtype, memory_format, inputs=1):
    """Return a forward and backward pass through a function of random inputs that require gradients."""
    block = torch.randn(1 << 16).to(device, dtype)
    count = torch.Size(SHAPE).numel()

    def fresh(shift):
        return block.roll(shift).repeat(count // block.numel()).view(SHAPE).contiguous(memory_format=memory_format)

    leaves = [fresh(index).requires_grad_() for index in range(inputs)]
    grad = fresh(inputs)

    def step():
        function(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return step


def compare(own, torchs, device, dtype, memory_format, inputs=1):
    """Return the peak memory of one function and of another."""
    peaks = []
    for function in (own, torchs):
        step = step_of(function, device, dtype, memory_format, inputs)
        step()
        peaks.append(gpu.peak(step, device))
    return peaks


@formats
@dtypes
def test_a_layer_takes_no_more_than_that_of_torch(memory_format, dtype, device):
    own, torchs = bnlab.nn.BatchNorm2d(SHAPE[1]).to(device), nn.BatchNorm2d(SHAPE[1]).to(device)
    left, right = compare(own, torchs, device, dtype, memory_format)
    assert left <= 1.05 * right


@formats
@dtypes
def test_a_fused_layer_takes_no_more_than_that_of_torch_without_the_relu(memory_format, dtype, device):
    """ReLU in place costs torch nothing, and so it must cost the fused layer nothing."""
    own = bnlab.nn.BatchNorm2d(SHAPE[1], activation="relu").to(device)
    torchs = nn.BatchNorm2d(SHAPE[1]).to(device)
    left, right = compare(own, lambda x: F.relu(torchs(x), inplace=True), device, dtype, memory_format)
    assert left <= 1.05 * right


@formats
@dtypes
def test_a_fused_residual_takes_no_more_than_that_of_torch(memory_format, dtype, device):
    own = bnlab.nn.BatchNorm2d(SHAPE[1], activation="relu").to(device)
    torchs = nn.BatchNorm2d(SHAPE[1]).to(device)

    def in_torch(x, residual):
        y = torchs(x)
        y += residual
        return F.relu(y, inplace=True)

    left, right = compare(own, in_torch, device, dtype, memory_format, inputs=2)
    assert left <= 1.05 * right


@dtypes
def test_eval_mode_keeps_nothing_where_only_the_input_has_a_gradient(dtype, device):
    layer = bnlab.nn.BatchNorm2d(SHAPE[1]).to(device).eval().requires_grad_(False)
    x = torch.zeros(SHAPE, device=device, dtype=dtype, requires_grad=True)
    own = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: own.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert max(own, default=0) <= SHAPE[1]


def test_nothing_stays_allocated(device):
    """What is kept for all launches of a shape is small, and does not grow."""
    layer = bnlab.nn.BatchNorm2d(SHAPE[1], activation="relu").to(device)

    def leftover():
        step_of(layer, device, torch.bfloat16, torch.contiguous_format)()
        layer.zero_grad()
        gc.collect()
        return gpu.allocated(device)

    leftover()
    before = leftover()
    assert [leftover() - before for _ in range(3)] == [0, 0, 0]


@formats
def test_more_elements_than_32_bits_count(memory_format, device):
    """x = a[n] s[h] b[c, w] with powers of two for a and s is exact in bfloat16, and its sums are products of sums."""
    if gpu.free_memory(device) < 10 * SAMPLES * CHANNELS * SIDE * SIDE:
        pytest.skip("needs 22 GB of free memory")
    case = Product(SAMPLES, CHANNELS, SIDE)
    layer = bnlab.nn.BatchNorm2d(CHANNELS, momentum=1.0, activation="relu").to(device)
    x = case.filled(case.values, device, memory_format).requires_grad_()
    y = layer(x)
    assert_near(layer.running_var, case.var * case.count / (case.count - 1), 1e-6)
    case.compare(y.detach(), case.normalized().relu())
    y.backward(torch.ones_like(y))
    case.compare(x.grad, case.dx())
    del y
    x.grad = None
    y = layer.eval()(x.detach())
    case.compare(y, case.normalized().relu())


class Product:
    """A tensor of products, of which a few samples and rows are looked at, the last ones included."""

    def __init__(self, samples, channels, side):
        generator = torch.Generator().manual_seed(0)

        def powers(count):
            return torch.randint(-1, 2, (count,), generator=generator).double().exp2() * torch.randint(
                0, 2, (count,), generator=generator
            ).mul(2).sub(1)

        self.samples, self.rows, self.count = powers(samples), powers(side), samples * side * side
        self.values = torch.randn(channels, side, generator=generator).bfloat16().double()
        self.looked_at = (0, samples // 2, samples - 1), (0, side // 2, side - 1)
        outer = self.samples.mean() * self.rows.mean(), self.samples.square().mean() * self.rows.square().mean()
        self.mean = outer[0] * self.values.mean(1)
        self.var = outer[1] * self.values.square().mean(1) - self.mean.square()
        self.shape = (samples, channels, side, side)

    def filled(self, values, device, memory_format):
        """Return the whole tensor, in bfloat16."""
        x = torch.empty(self.shape, dtype=torch.bfloat16, device=device, memory_format=memory_format)
        sample = (values[:, None] * self.rows[:, None]).to(device, torch.bfloat16)
        for index, factor in enumerate(self.samples.tolist()):
            torch.mul(sample, factor, out=x[index])
        return x

    def part(self, values):
        """Return the samples and rows that are looked at, in float64, of shape (n, c, h, w)."""
        samples, rows = (
            factors[list(at)] for factors, at in zip((self.samples, self.rows), self.looked_at, strict=True)
        )
        return samples[:, None, None, None] * rows[:, None] * values[:, None]

    def normalized(self, values=None):
        values = self.part(self.values) if values is None else values
        return (values - self.mean[:, None, None]) / (self.var[:, None, None] + 1e-5).sqrt()

    def dx(self):
        """Return the gradient of the sum of relu(x_hat), sample by sample so that little lies in memory."""
        mean, inv_std = self.mean[:, None, None], (self.var[:, None, None] + 1e-5).rsqrt()
        total, projected = torch.zeros(2, self.values.size(0)).double()
        factors = torch.outer(self.samples, self.rows).flatten()
        for factor, number in zip(*factors.unique(return_counts=True), strict=True):
            x_hat = (factor * self.values - mean[..., 0]) * inv_std[..., 0]
            total += number * (x_hat > 0).sum(1)
            projected += number * x_hat.relu().sum(1)
        x_hat = self.normalized()
        through = (
            (x_hat > 0).double() - (total / self.count)[:, None, None] - x_hat * (projected / self.count)[:, None, None]
        )
        return through * inv_std

    def compare(self, tensor, expected):
        """Compare where the sign of the output does not hang on rounding."""
        decided = self.normalized().abs() > 1e-4
        part = tensor[list(self.looked_at[0])][:, :, list(self.looked_at[1])]
        assert_near(part.detach().cpu() * decided, expected * decided, 4 * torch.finfo(torch.bfloat16).eps)
