"""The layers on a GPU against float64 on the CPU: every shape, layout, dtype and form, forward and backward."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests import oracle
from tests.gpu.cases import (
    DTYPES,
    SHAPES,
    SLOPES,
    assert_moved,
    assert_near,
    assert_right,
    batch_of,
    expected_of,
    laid_out,
    layer_for,
    run,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError

layouts = pytest.mark.parametrize("layout", oracle.LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
FORMS = [(activation, residual) for activation in SLOPES for residual in (False, True)]
forms = pytest.mark.parametrize(("activation", "residual"), FORMS)


def in_eval_mode(layer, batch):
    """Put a layer in eval mode with running statistics near those of the batch, and return them in float64."""
    channels = batch.x.size(1)
    generator = torch.Generator().manual_seed(1)
    layer.running_mean.copy_(0.1 * torch.randn(channels, generator=generator))
    layer.running_var.copy_(0.5 + torch.rand(channels, generator=generator))
    layer.eval()
    return layer.running_mean.cpu().double(), layer.running_var.cpu().double()


@layouts
@dtypes
@shapes
def test_train_mode(layout, dtype, shape, device):
    batch, expected = expected_of(batch_of(shape, dtype, residual=True), "relu")
    layer = layer_for(batch, device, activation="relu")
    results = run(layer, batch, layout, device)
    assert_right(results, expected, batch)
    assert_moved(layer, expected, 0.1)
    assert (layer.num_batches_tracked, layer.skipped_batches) == (1, 0)
    dense = torch.empty_like(laid_out(batch.x, layout, device)).stride()
    assert {t.stride() for t in (results.y, results.dx)} == {dense}
    assert {t.device for t in (*results.tensors(), *layer.buffers(), layer.skipped_batches)} == {device}


@layouts
@dtypes
@shapes
def test_eval_mode(layout, dtype, shape, device):
    batch = batch_of(shape, dtype, residual=True)
    layer = layer_for(batch, device, activation="relu")
    statistics = in_eval_mode(layer, batch)
    batch, expected = expected_of(batch, "relu", statistics)
    assert_right(run(layer, batch, layout, device), expected, batch)
    assert_close(layer.running_var.cpu().double(), statistics[1], rtol=0, atol=0)
    assert layer.num_batches_tracked == 0


@forms
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_form(activation, residual, dtype, layout, training, device):
    batch = batch_of((4, 24, 14, 14), dtype, residual=residual)
    layer = layer_for(batch, device, activation=activation)
    statistics = None if training else in_eval_mode(layer, batch)
    batch, expected = expected_of(batch, activation, statistics)
    fused = "backend=triton" in repr(layer)
    assert_right(run(layer, batch, layout, device), expected, batch, in_one_kernel=fused)


def test_the_oracle_catches_a_wrong_gradient_and_a_wrong_statistic(device):
    batch, expected = expected_of(batch_of((8, 5, 7, 9), torch.float32, residual=True), "relu")
    layer = layer_for(batch, device, activation="relu")
    results = run(layer, batch, "contiguous", device)
    assert_right(results, expected, batch)
    for name in ("y", "dx", "dresidual", "dweight", "dbias"):
        wrong = replace(results, **{name: getattr(results, name) * (1 + 1e-4)})
        with pytest.raises(AssertionError):
            assert_right(wrong, expected, batch)
    layer.running_var.mul_(1 + 1e-4)
    with pytest.raises(AssertionError):
        assert_moved(layer, expected, 0.1)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [SHAPES["2d"], SHAPES["14 by 14"], SHAPES["n-c-l"], SHAPES["long n-c"]])
def test_masked_positions_do_not_count(layout, dtype, shape, device):
    batch, expected = expected_of(batch_of(shape, dtype, masked=True))
    layer = layer_for(batch, device)
    assert_right(run(layer, batch, layout, device), expected, batch)
    assert_moved(layer, expected, 0.1)


@layouts
def test_weights_between_0_and_1_and_garbage_behind_the_mask(layout, device):
    batch = batch_of((8, 5, 7, 9), torch.float32)
    mask = torch.rand(8, 1, 7, 9)
    mask[:, :, -2:] = 0
    batch, expected = expected_of(replace(batch, mask=mask), "relu")
    garbage = batch.x.clone()
    garbage[:, :, -2:] = float("nan")
    hidden = replace(batch, x=garbage, grad=torch.where(mask > 0, batch.grad, 0))
    layer = layer_for(batch, device, activation="relu")
    results = run(layer, hidden, layout, device)
    assert_moved(layer, expected, 0.1)
    assert all(bool(gradient.isfinite().all()) for gradient in (results.dx, results.dweight, results.dbias))
    assert_near(results.y[:, :, :-2], expected.y[:, :, :-2], 8 * torch.finfo(torch.float32).eps)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mask_with_a_residual_and_an_activation(dtype, layout, device):
    batch, expected = expected_of(batch_of((8, 5, 7, 9), dtype, residual=True, masked=True), "leaky_relu")
    layer = layer_for(batch, device, activation="leaky_relu")
    results = run(layer, batch, layout, device)
    # The sum and the activation are operators of torch here, each of which rounds.
    eps = torch.finfo(dtype).eps
    assert_near(results.y, expected.y, 8 * eps)
    assert_near(results.dx, expected.dx, 32 * eps)


@dtypes
def test_parameters_in_the_dtype_of_the_input(dtype, device):
    batch = batch_of((8, 5, 7, 9), dtype, residual=True)
    rounded = replace(batch, weight=batch.weight.to(dtype).float(), bias=batch.bias.to(dtype).float())
    batch, expected = expected_of(rounded, "relu")
    layer = layer_for(batch, device, activation="relu").to(dtype)
    results = run(layer, batch, "contiguous", device)
    assert (results.dweight.dtype, layer.running_var.dtype) == (dtype, torch.float32)
    for gradient, exact in ((results.dweight, expected.dweight), (results.dbias, expected.dbias)):
        assert_near(gradient, exact, 2 * torch.finfo(dtype).eps)
    assert_near(results.y, expected.y, 4 * torch.finfo(dtype).eps)
    assert_moved(layer, expected, 0.1)


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",)], ids=["affine=False", "bias=False"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layers_without_parameters(missing, training, device):
    batch = batch_of((8, 5, 7, 9), torch.float32, residual=True)
    plain = {"weight": torch.ones(5), "bias": torch.zeros(5)}
    batch = replace(batch, **{name: plain[name] for name in missing})
    options = {"affine": False} if "weight" in missing else {"bias": False}
    layer = bnlab.nn.BatchNorm2d(5, activation="relu", **options)
    if layer.weight is not None:
        layer.weight.data.copy_(batch.weight)
    layer = layer.to(device)
    statistics = None if training else in_eval_mode(layer, batch)
    batch, expected = expected_of(batch, "relu", statistics)
    x, residual = (t.to(device).requires_grad_() for t in (batch.x, batch.residual))
    y = layer(x, residual)
    dx, dresidual = torch.autograd.grad(y, (x, residual), batch.grad.to(device))
    for values, exact in ((y, expected.y), (dx, expected.dx), (dresidual, expected.dresidual)):
        assert_near(values.detach(), exact, 16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("other", oracle.LAYOUTS)
def test_a_gradient_and_a_residual_in_another_layout(layout, other, device):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32, residual=True), "relu")
    layer = layer_for(batch, device, activation="relu")
    x = laid_out(batch.x, layout, device).requires_grad_()
    residual = laid_out(batch.residual, other, device).requires_grad_()
    y = layer(x, residual)
    dx, dresidual = torch.autograd.grad(y, (x, residual), laid_out(batch.grad, other, device))
    for values, exact in ((y, expected.y), (dx, expected.dx), (dresidual, expected.dresidual)):
        assert_near(values.detach(), exact, 16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_gradient_that_is_expanded(layout, device):
    batch, _ = expected_of(batch_of((4, 24, 14, 14), torch.float32))
    batch, expected = expected_of(replace(batch, grad=torch.ones_like(batch.x)))
    layer = layer_for(batch, device)
    x = laid_out(batch.x, layout, device).requires_grad_()
    layer(x).sum().backward()
    assert_near(layer.bias.grad, expected.dbias, 1e-6)
    assert float(x.grad.abs().max()) <= 1e-5  # the output sums to 0 whatever the input


def test_only_the_gradients_that_are_wanted(device):
    batch, expected = expected_of(batch_of((8, 5, 7, 9), torch.float32, residual=True), "relu")
    for wanted in ("x", "residual", "weight", "bias"):
        layer = layer_for(batch, device, activation="relu").requires_grad_(False)
        x, residual = (t.clone().to(device) for t in (batch.x, batch.residual))
        leaves = {"x": x, "residual": residual, "weight": layer.weight, "bias": layer.bias}
        leaves[wanted].requires_grad_(True)
        layer(x, residual).backward(batch.grad.to(device))
        assert_near(leaves[wanted].grad, getattr(expected, f"d{wanted}"), 16 * torch.finfo(torch.float32).eps)
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(0, 5, 7, 9), (4, 5, 0, 9), (0, 5)])
def test_an_empty_batch_changes_nothing(layout, shape, device):
    layer = getattr(bnlab.nn, f"BatchNorm{max(1, len(shape) - 2)}d")(shape[1], activation="relu").to(device)
    before = copy.deepcopy(layer.state_dict())
    x = laid_out(torch.zeros(shape), layout, device).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == (shape, shape)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.eval()(x).shape == shape


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_other_activations_and_residuals_that_broadcast(training, device):
    batch, expected = expected_of(batch_of((8, 5, 7, 9), torch.float32))
    layer = layer_for(batch, device, activation="gelu")
    if not training:
        _, expected = expected_of(batch, statistics=in_eval_mode(layer, batch))
    added = torch.randn(1, 5, 1, 1)
    y = layer(batch.x.to(device), added.to(device))
    assert_near(y.detach(), F.gelu(expected.y + added.double()), 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float64(layout, device):
    batch, expected = expected_of(batch_of((8, 5, 7, 9), torch.float64, ratio=1e2), "relu")
    layer = layer_for(batch, device, activation="relu").double()
    results = run(layer, batch, layout, device)
    assert_near(results.y, expected.y, 1e-12)
    assert_near(results.dx, expected.dx, 1e-12)


VARIANTS = {
    "ghost": (bnlab.nn.GhostBatchNorm2d, {"ghost_size": 2}),
    "renorm": (bnlab.nn.BatchRenorm2d, {"r_max": 2.0, "d_max": 1.0}),
    "frozen": (bnlab.nn.FrozenBatchNorm2d, {}),
    "frozen, moving": (bnlab.nn.FrozenBatchNorm2d, {"moves_statistics": True}),
}


@pytest.mark.parametrize(("kind", "options"), VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_variants_agree_with_float64_on_the_cpu(kind, options, layout, training, device):
    exact = kind(5, activation="relu", **options).double().train(training).requires_grad_(True)
    in_eval_mode(exact, batch_of((8, 5, 7, 9), torch.float32))
    exact.train(training)
    layer = copy.deepcopy(exact).float().to(device)
    for seed in range(3):
        batch = batch_of((8, 5, 7, 9), torch.float32, residual=True, seed=seed)
        left, right = batch.x.double().requires_grad_(), laid_out(batch.x, layout, device).requires_grad_()
        expected = exact(left, batch.residual.double())
        y = layer(right, laid_out(batch.residual, layout, device))
        assert_near(y.detach(), expected.detach(), 1e-5)
        grad = torch.where(expected.abs() < 1e-3, 0, batch.grad.double())
        expected.backward(grad)
        y.backward(laid_out(grad.float(), layout, device))
        assert_near(right.grad, left.grad, 1e-5)
    for name, value in exact.state_dict().items():
        assert_close(layer.state_dict()[name].cpu().to(value.dtype), value, rtol=1e-5, atol=1e-6)


def test_state_dicts_copies_and_moves(device):
    layer = bnlab.nn.BatchNorm2d(5)
    layer(torch.randn(8, 5, 7, 9))
    layer(torch.full((8, 5, 7, 9), float("nan")))
    there_and_back = copy.deepcopy(layer).to(device)
    assert {t.device for t in (*there_and_back.state_dict().values(), there_and_back.skipped_batches)} == {device}
    there_and_back(torch.randn(8, 5, 7, 9).to(device))
    torchs = nn.BatchNorm2d(5).to(device)
    torchs.load_state_dict(there_and_back.state_dict())
    there_and_back.cpu()
    assert (there_and_back.num_batches_tracked, there_and_back.skipped_batches) == (2, 1)
    assert_close(there_and_back.running_var, torchs.running_var.cpu(), rtol=0, atol=0)


def test_an_input_on_another_device_is_refused(hardware):
    layer = bnlab.nn.BatchNorm2d(5).to(hardware)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((UsageError, RuntimeError)):
        layer(torch.randn(8, 5, 7, 9))
    with pytest.raises((UsageError, RuntimeError)):
        layer(torch.randn(8, 5, 7, 9).to(hardware), torch.randn(8, 5, 7, 9))
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
