"""The same bits in every run, on every stream, and beside the kernels of other streams."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.gpu import hardware as gpu
from tests.gpu.cases import batch_of, expected_of, laid_out, layer_for, run

layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPES = {
    "fits on the chip": (32, 64, 28, 28),
    "large": (32, 64, 112, 112),
    "7 by 7": (32, 512, 7, 7),
    "one channel": (64, 1, 112, 112),
    "n-c": (4096, 100),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def results_of(layer, batch, layout, device):
    """Return all that a fresh copy of a layer computes, running statistics included."""
    layer = copy.deepcopy(layer)
    results = run(layer, batch, layout, device)
    return [*results.tensors(), layer.running_mean, layer.running_var]


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@layouts
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(layout, shape, dtype, device):
    batch = batch_of(shape, dtype, residual=True)
    layer = layer_for(batch, device, activation="relu")
    first = results_of(layer, batch, layout, device)
    for _ in range(10):
        assert_same_bits(first, results_of(layer, batch, layout, device))


@layouts
@pytest.mark.parametrize("masked", [False, True])
def test_every_run_gives_the_same_bits_with_a_mask_and_in_eval_mode(layout, masked, device):
    batch = batch_of((32, 64, 28, 28), torch.bfloat16, masked=masked)
    for training in (True, False):
        layer = layer_for(batch, device).train(training)
        first = results_of(layer, batch, layout, device)
        for _ in range(10):
            assert_same_bits(first, results_of(layer, batch, layout, device))


@layouts
@shapes
def test_the_same_bits_beside_the_kernels_of_another_stream(layout, shape, hardware):
    """A barrier between programs must not need all of them on the chip at once while others take the place."""
    batch = batch_of(shape, torch.bfloat16, residual=True)
    layer = layer_for(batch, hardware, activation="relu")
    first = results_of(layer, batch, layout, hardware)
    for _ in range(3):
        stream = gpu.busy(hardware)
        beside = [results_of(layer, batch, layout, hardware) for _ in range(5)]
        torch.cuda.current_stream(hardware).wait_stream(stream)
        for other in beside:
            assert_same_bits(first, other)


@layouts
@shapes
def test_layers_on_several_streams_at_once(layout, shape, hardware):
    """Two launches that wait for programs of their own must not take each other's place on the chip."""
    batch = batch_of(shape, torch.bfloat16, residual=True)
    layers = [layer_for(batch, hardware, activation="relu") for _ in range(4)]
    first = results_of(layers[0], batch, layout, hardware)
    x, residual, grad = (laid_out(t, layout, hardware) for t in (batch.x, batch.residual, batch.grad))
    streams = [torch.cuda.Stream(hardware) for _ in layers]
    gpu.wait(hardware)
    outputs = []
    for _ in range(10):
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                leaf = x.detach().requires_grad_()
                y = layer(leaf, residual)
                (dx,) = torch.autograd.grad(y, leaf, grad)
                outputs.append((y.detach(), dx))
    gpu.wait(hardware)
    for y, dx in outputs:
        assert torch.equal(y, first[0])
        assert torch.equal(dx, first[1])
    for layer in layers[1:]:
        assert torch.equal(layer.running_var, layers[0].running_var)
        assert layer.num_batches_tracked == 10


def test_one_layer_runs_on_the_stream_that_is_current(hardware):
    """The layer must launch there: a product before it and a sum after it are ordered by the stream alone."""
    layer = layer_for(batch_of((8, 5, 7, 9), torch.float32), hardware)
    x = batch_of((8, 5, 7, 9), torch.float32).x.to(hardware)
    expected = copy.deepcopy(layer)(2 * x)
    gpu.wait(hardware)
    stream = torch.cuda.Stream(hardware)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some hundredths of a second, in which another stream would overtake
        y = layer(x * 2) * 1
    stream.synchronize()
    assert torch.equal(y, expected)


def test_backward_on_another_thread_and_stream(hardware):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32, residual=True), "relu")
    layer = layer_for(batch, hardware, activation="relu")
    stream = torch.cuda.Stream(hardware)
    x, residual, grad = (t.to(hardware) for t in (batch.x, batch.residual, batch.grad))
    stream.wait_stream(torch.cuda.current_stream(hardware))
    with torch.cuda.stream(stream):
        x.requires_grad_()
        y = layer(x, residual)
    torch.cuda.current_stream(hardware).wait_stream(stream)
    y.backward(grad)  # autograd runs this on the stream of the forward pass, and waits
    error = float((x.grad.cpu().double() - expected.dx).abs().max())
    assert error <= 1e-5 * float(expected.dx.abs().max())
