"""The running statistics and counters on a GPU, which decide there whether a batch counts."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.gpu.cases import DTYPES, assert_moved, batch_of, expected_of, laid_out, layer_for, run
from torch.testing import assert_close

layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPE = (4, 24, 14, 14)


def batches(count, dtype=torch.float32):
    """Return batches with means and spreads of their own, and what float64 makes of them."""
    pairs = []
    for seed in range(count):
        batch = batch_of(SHAPE, dtype, ratio=seed, seed=seed)
        pairs.append(expected_of(batch))
    return pairs


def averaged(expected, momentum):
    """Return the running statistics after some batches, in float64; momentum None for a plain average."""
    mean, var = torch.zeros(SHAPE[1]).double(), torch.ones(SHAPE[1]).double()
    for number, of in enumerate(expected, 1):
        weight = 1 / number if momentum is None else momentum
        mean = (1 - weight) * mean + weight * of.mean
        var = (1 - weight) * var + weight * of.var * of.count / (of.count - 1)
    return mean, var


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_every_momentum(layout, dtype, momentum, device):
    pairs = batches(5, dtype)
    layer = layer_for(pairs[0][0], device, momentum=momentum, activation="relu")
    for batch, _ in pairs:
        run(layer, batch, layout, device)
    mean, var = averaged([expected for _, expected in pairs], momentum)
    assert_close(layer.running_mean.cpu().double(), mean, rtol=2e-6, atol=1e-6)
    assert_close(layer.running_var.cpu().double(), var, rtol=2e-6, atol=1e-6)
    assert (layer.num_batches_tracked, layer.skipped_batches) == (5, 0)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(layout, dtype, value, momentum, device):
    (first, expected), (second, _) = batches(2, dtype)
    layer = layer_for(first, device, momentum=momentum)
    run(layer, first, layout, device)
    before = copy.deepcopy(layer.state_dict())
    spoilt = second.x.clone()
    spoilt[3, 23, 13, 13] = value
    for count in (1, 2):
        y = layer(laid_out(spoilt, layout, device))
        assert (layer.num_batches_tracked, layer.skipped_batches) == (1, count)
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert bool(y[:, :23].isfinite().all())
    assert not bool(y[:, 23].isfinite().all())
    layer.eval()(laid_out(spoilt, layout, device))
    assert layer.skipped_batches == 2
    run(layer.train(), first, layout, device)
    assert layer.num_batches_tracked == 2
    if momentum is None:
        assert_moved(layer, expected, 1.0)


@layouts
def test_propagate_does_what_torch_does(layout, device):
    layer = layer_for(batch_of(SHAPE, torch.float32), device, nonfinite="propagate")
    spoilt = batch_of(SHAPE, torch.float32).x.clone()
    spoilt[0, 5, 0, 0] = float("nan")
    layer(laid_out(spoilt, layout, device))
    assert (layer.num_batches_tracked, layer.skipped_batches) == (1, 0)
    assert layer.running_mean.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_mask_that_keeps_fewer_than_two_values_is_skipped_and_counted(kept, device):
    batch = batch_of((6, 5), torch.float32)
    layer = layer_for(batch, device)
    before = copy.deepcopy(layer.state_dict())
    mask = torch.zeros(6, dtype=torch.bool)
    mask[:kept] = True
    layer(batch.x.to(device), mask=mask.to(device))
    assert layer.skipped_batches == 1
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_no_gradient_and_no_tracking(device):
    batch, expected = expected_of(batch_of(SHAPE, torch.float32))
    layer = layer_for(batch, device)
    with torch.no_grad():
        layer(batch.x.to(device))
    assert_moved(layer, expected, 0.1)
    with torch.inference_mode():
        layer(batch.x.to(device))
    assert layer.num_batches_tracked == 2
    layer.track_running_stats = False
    layer(batch.x.to(device))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_buffers_in_half_precision(dtype, device):
    batch, expected = expected_of(batch_of(SHAPE, dtype))
    layer = layer_for(batch, device, statistics_dtype=None).to(dtype)
    layer(batch.x.to(device))
    assert layer.running_var.dtype == dtype
    after = 0.1 * expected.mean
    assert_close(layer.running_mean.cpu().double(), after, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert layer.num_batches_tracked == 1


def test_a_counter_that_is_not_int64_and_no_counter(device):
    batch, expected = expected_of(batch_of(SHAPE, torch.float32))
    layer = layer_for(batch, device)
    layer.num_batches_tracked = layer.num_batches_tracked.int()
    layer(batch.x.to(device))
    assert layer.num_batches_tracked == 1
    assert_moved(layer, expected, 0.1)
    layer = layer_for(batch, device)
    layer.num_batches_tracked = None
    layer(batch.x.to(device))
    assert_moved(layer, expected, 0.1)


def test_withheld_buffers_and_buffers_as_attributes(device):
    batch, expected = expected_of(batch_of(SHAPE, torch.float32))
    layer = layer_for(batch, device)
    mean, var = layer.running_mean, layer.running_var
    layer.running_mean = layer.running_var = None
    layer.eval()(batch.x.to(device))
    layer.running_mean, layer.running_var = mean, var
    assert (mean == 0).all()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, value)
    layer.train()(batch.x.to(device))
    assert_moved(layer, expected, 0.1)


def test_the_gradient_of_eval_mode_is_that_of_the_statistics_of_its_forward_pass(device):
    batch = batch_of(SHAPE, torch.float32, residual=True)
    layer = layer_for(batch, device, activation="relu", momentum=1.0)
    statistics = torch.zeros(SHAPE[1]).double(), torch.ones(SHAPE[1]).double()
    batch, expected = expected_of(batch, "relu", statistics)
    x, residual = batch.x.clone().to(device).requires_grad_(), batch.residual.to(device)
    y = layer.eval()(x, residual)
    layer.train()(3 + 2 * batch.x.to(device))
    y.backward(batch.grad.to(device))
    assert_close(x.grad.cpu().double(), expected.dx, rtol=1e-5, atol=1e-5)
    assert_close(layer.weight.grad.cpu().double(), expected.dweight, rtol=1e-4, atol=1e-4)
