"""Every other way to differentiate on a GPU: torch.func, second derivatives, checkpointing, accumulation, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.gpu.cases import assert_moved, assert_near, assert_right, batch_of, expected_of, laid_out, layer_for, run
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnlab

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func's own use of torch.jit
SHAPE = (6, 5, 7, 9)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pair(device, training=True, **options):
    """Return a layer in float64 on the CPU, and a copy in float32 on the device."""
    exact = layer_for(batch_of(SHAPE, torch.float32), torch.device("cpu"), **options).double().train(training)
    exact.running_mean.copy_(torch.linspace(-1, 1, 5))
    exact.running_var.copy_(torch.linspace(0.5, 2, 5))
    return exact, copy.deepcopy(exact).float().to(device)


@modes
def test_grad_and_jvp_of_torch_func(training, device):
    exact, layer = pair(device, training)
    x, tangent, weights = torch.randn(3, *SHAPE)

    def derivatives(net, x, tangent, weights):
        def output(x, weight):
            own = {name: buffer.clone() for name, buffer in net.named_buffers()}
            return functional_call(net, {**own, "weight": weight}, (x,))

        gradients = grad(lambda x, weight: (output(x, weight) * weights).sum(), (0, 1))(x, net.weight.detach())
        return *gradients, jvp(lambda x: output(x, net.weight.detach()), (x,), (tangent,))[1]

    expected = derivatives(exact, x.double(), tangent.double(), weights.double())
    got = derivatives(layer, *(t.to(device) for t in (x, tangent, weights)))
    for values, right in zip(got, expected, strict=True):
        assert_near(values, right, 1e-5)


@modes
def test_stacked_models_under_vmap(training, device):
    models = [pair(device, training)[1] for _ in range(3)]
    for index, model in enumerate(models):
        model.weight.data.add_(index)
    x = torch.randn(3, *SHAPE).to(device)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    for index, model in enumerate(models):
        assert_close(y[index], model(x[index]), rtol=1e-5, atol=1e-5)
        for name, buffer in model.named_buffers():
            assert_close(buffers[name][index], buffer)


@modes
def test_forward_mode(training, device):
    exact, layer = pair(device, training)
    x, tangent = torch.randn(2, *SHAPE)
    tangents = []
    for net, of in ((exact, lambda t: t.double()), (layer, lambda t: t.to(device))):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(net(forward_ad.make_dual(of(x), of(tangent)))).tangent)
    assert_near(tangents[1].detach(), tangents[0].detach(), 1e-5)


@modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_second_derivatives(training, layout, activation, device):
    exact, layer = pair(device, training, activation=activation)
    values, weights, added = torch.randn(3, *SHAPE)
    seconds = []
    for net, of in ((exact, lambda t: t.double()), (layer, lambda t: laid_out(t, layout, device))):
        x, residual = of(values).requires_grad_(), of(added)
        (dx,) = torch.autograd.grad((net(x, residual) * of(weights)).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad((dx * of(weights)).square().sum(), (x, net.weight), allow_unused=True))
    for exact_gradient, gradient in zip(*seconds, strict=True):
        if exact_gradient is None or not exact_gradient.any():
            assert gradient is None or not gradient.any()
        else:
            assert_near(gradient, exact_gradient, 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_moves_the_statistics_once(reentrant, device):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32, residual=True), "relu")
    layer = layer_for(batch, device, activation="relu")
    x, residual = (t.clone().to(device).requires_grad_() for t in (batch.x, batch.residual))
    y = checkpoint(layer, x, residual, use_reentrant=reentrant)
    y.backward(batch.grad.to(device))
    assert_near(y.detach(), expected.y, 1e-6)
    assert_near(x.grad, expected.dx, 1e-5)
    assert_near(residual.grad, expected.dresidual, 1e-6)
    assert_near(layer.weight.grad, expected.dweight, 1e-5)
    assert_moved(layer, expected, 0.1)
    assert layer.num_batches_tracked == 1


def test_a_checkpoint_of_a_batch_that_does_not_count(device):
    layer = layer_for(batch_of(SHAPE, torch.float32), device)
    x = torch.full(SHAPE, float("nan")).to(device).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert (layer.num_batches_tracked, layer.skipped_batches) == (0, 1)


def test_gradients_accumulate_over_micro_batches(device):
    exact, layer = pair(device, activation="relu")
    graphs = []
    for _ in range(3):
        x = torch.randn(SHAPE)
        y = exact(x.double())
        weights = torch.where(y.abs() < 1e-3, 0, torch.randn(SHAPE).double())
        y.backward(weights)
        graphs.append((layer(x.to(device)), weights.float().to(device)))
    for y, weights in reversed(graphs):  # every forward pass before the first backward pass
        y.backward(weights)
    for parameter, right in zip(layer.parameters(), exact.parameters(), strict=True):
        assert_near(parameter.grad, right.grad, 1e-5)
    assert layer.num_batches_tracked == 3
    assert_near(layer.running_var, exact.running_var, 1e-6)


def test_backward_twice_through_one_graph(device):
    layer = layer_for(batch_of(SHAPE, torch.float32), device, activation="relu")
    x = torch.randn(SHAPE).to(device).requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    layer(1 + x.detach())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast(dtype, layout, device):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), dtype, residual=True), "relu")
    layer = layer_for(batch, device, activation="relu")
    with torch.autocast(device.type, dtype):
        results = run(layer, batch, layout, device)
    assert_right(results, expected, batch)
    assert {t.dtype for t in (layer.weight, layer.weight.grad, layer.running_var)} == {torch.float32}
    wide, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32), "relu")
    layer = layer_for(wide, device, activation="relu")
    with torch.autocast(device.type, dtype):
        assert_right(run(layer, wide, layout, device), expected, wide)


def test_a_network_under_autocast_with_a_scaled_loss(device):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), bnlab.nn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3)).to(device)
    scaler, optimizer = torch.amp.GradScaler(device.type), torch.optim.SGD(net.parameters(), 0.1)
    before = net[1].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            y = net(torch.randn(4, 3, 9, 9).to(device))
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (net[1].num_batches_tracked, y.dtype) == (2, torch.float16)
    assert not torch.equal(net[1].weight, before)
