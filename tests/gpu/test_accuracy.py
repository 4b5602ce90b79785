"""4 eps in every layout, whatever the mean, the range or the order of the values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests import oracle
from tests.gpu.cases import (
    DTYPES,
    SHAPES,
    assert_near,
    assert_right,
    batch_of,
    expected_of,
    laid_out,
    layer_for,
    run,
)

layouts = pytest.mark.parametrize("layout", oracle.LAYOUTS)
FAR = ["long n-c", "n-c-l", "3d", "one channel", "7 by 7", "14 by 14", "28 by 28", "112 by 112", "2048 channels"]


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FAR)
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_from_0(layout, dtype, shape, ratio, device):
    batch, expected = expected_of(batch_of(SHAPES[shape], dtype, ratio=ratio), "relu")
    layer = layer_for(batch, device, activation="relu", track_running_stats=False)
    assert_right(run(layer, batch, layout, device), expected, batch)


@layouts
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_running_statistics_far_from_0(layout, ratio, device):
    batch, trained = expected_of(batch_of(SHAPES["14 by 14"], torch.float32, ratio=ratio))
    layer = layer_for(batch, device, momentum=1.0)
    run(layer, batch, layout, device)
    mean, var = (buffer.cpu().double() for buffer in (layer.running_mean, layer.running_var))
    assert_near(layer.running_mean, trained.mean, 2 * torch.finfo(torch.float32).eps)
    unbiased = trained.var * trained.count / (trained.count - 1)
    assert float(((var - unbiased) / unbiased).abs().max()) <= 1e-6
    batch, expected = expected_of(batch, statistics=(mean, var))
    assert oracle.error_in_eps(run(layer.eval(), batch, layout, device).y.cpu(), expected.y.numpy()) <= 4


def test_the_bound_catches_the_layer_of_torch(device):
    batch, expected = expected_of(batch_of((8, 64, 28, 28), torch.float32, ratio=1e4))
    x = laid_out(batch.x, "channels_last", device)
    weight, bias = batch.weight.to(device), batch.bias.to(device)
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    assert oracle.error_in_eps(y.cpu(), expected.y.numpy()) > 20


@layouts
@pytest.mark.parametrize("shape", ["2d", "14 by 14", "28 by 28"])
@pytest.mark.parametrize("scale", [1e20, 1e30, 3e38])
def test_values_near_the_range_of_float32(layout, shape, scale, device):
    batch = batch_of(SHAPES[shape], torch.float32)
    batch, expected = expected_of(replace(batch, x=batch.x / batch.x.abs().max() * scale))
    layer = layer_for(batch, device, track_running_stats=False)
    results = run(layer, batch, layout, device)
    assert oracle.error_in_eps(results.y.cpu(), expected.y.numpy()) <= 4
    assert all(bool(gradient.isfinite().all()) for gradient in results.tensors())


@pytest.mark.filterwarnings("ignore:.*running_var must be finite:bnlab.errors.BnlabWarning")
def test_a_variance_beyond_float32_becomes_its_largest_value(device):
    batch, expected = expected_of(batch_of((8, 5, 7, 9), torch.float32))
    batch = replace(batch, x=batch.x * 1e25)
    narrow, wide = (layer_for(batch, device, statistics_dtype=dtype) for dtype in (torch.float32, torch.float64))
    wide.running_mean, wide.running_var = wide.running_mean.double(), wide.running_var.double()
    for layer in (narrow, wide):
        run(layer, batch, "contiguous", device)
        assert layer.num_batches_tracked == 1
    assert (narrow.running_var == torch.finfo(torch.float32).max).all()
    unbiased = expected.var * expected.count / (expected.count - 1)
    assert_near(wide.running_var, 0.1 * 1e50 * unbiased, 1e-6)


@layouts
@pytest.mark.parametrize("scale", [1e-15, 1e-22, 1e-30])
def test_tiny_values_keep_their_variance(layout, scale, device):
    batch = batch_of(SHAPES["14 by 14"], torch.float32)
    batch, expected = expected_of(replace(batch, x=batch.x * scale))
    layer = layer_for(batch, device, momentum=1.0)
    assert oracle.error_in_eps(run(layer, batch, layout, device).y.cpu(), expected.y.numpy()) <= 4
    unbiased = expected.var * expected.count / (expected.count - 1)
    normal = unbiased > torch.finfo(torch.float32).tiny
    ratio = layer.running_var.cpu().double() / unbiased
    assert bool(((ratio[normal] - 1).abs() <= 1e-6).all())


@layouts
@pytest.mark.parametrize("shape", ["2d", "7 by 7", "14 by 14", "28 by 28", "long n-c"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_outlier_hurts_nobody(layout, shape, place, device):
    batch = batch_of(SHAPES[shape], torch.float32, ratio=1e3)
    x = batch.x.clone()
    rows = x.movedim(1, -1).reshape(-1, x.size(1))  # a copy, in the order of the positions
    rows[{"first": 0, "middle": len(rows) // 2, "last": -1}[place]] = -1e6
    x = rows.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
    batch, expected = expected_of(replace(batch, x=x))
    layer = layer_for(batch, device, track_running_stats=False)
    assert oracle.error_in_eps(run(layer, batch, layout, device).y.cpu(), expected.y.numpy()) <= 4


@layouts
@pytest.mark.parametrize("shape", ["14 by 14", "28 by 28", "long n-c"])
def test_a_batch_that_is_sorted_by_its_mean(layout, shape, device):
    batch = batch_of(SHAPES[shape], torch.float32)
    samples = batch.x.size(0)
    steps = torch.where(torch.arange(samples) < (samples + 3) // 4, 1e4, 0.0)
    x = batch.x + steps.reshape(-1, *[1] * (batch.x.dim() - 1))
    batch, expected = expected_of(replace(batch, x=x))
    layer = layer_for(batch, device, track_running_stats=False)
    assert oracle.error_in_eps(run(layer, batch, layout, device).y.cpu(), expected.y.numpy()) <= 4


@layouts
def test_a_constant_channel_among_others(layout, device):
    batch = batch_of(SHAPES["14 by 14"], torch.float32)
    x = batch.x.clone()
    x[:, 3] = 0.1
    batch, expected = expected_of(replace(batch, x=x))
    layer = layer_for(batch, device, momentum=1.0)
    assert oracle.error_in_eps(run(layer, batch, layout, device).y.cpu(), expected.y.numpy()) <= 4
    assert layer.running_var[3] < 1e-15
