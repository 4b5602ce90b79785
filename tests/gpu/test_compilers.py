"""Compiled layers and networks on a GPU, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.gpu.cases import assert_moved, assert_near, assert_right, batch_of, expected_of, laid_out, layer_for, run
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

import bnlab

# Inductor warns of whatever it would like better, such as TF32.
pytestmark = pytest.mark.filterwarnings("ignore")
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch._dynamo.reset()


class Compiled(nn.Module):
    """A layer whose forward is compiled in one graph, and whose parameters have the names of the layer."""

    def __init__(self, layer, **options):
        super().__init__()
        self.layer = layer
        self.call = torch.compile(layer, fullgraph=True, **options)

    def forward(self, x, residual=None, *, mask=None):
        return self.call(x, residual, mask=mask)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)


@layouts
@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", False), ("relu", True)])
def test_a_layer_in_one_graph(layout, activation, residual, device):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32, ratio=1e2, residual=residual), activation)
    layer = layer_for(batch, device, activation=activation)
    assert_right(run(Compiled(layer), batch, layout, device), expected, batch)
    assert_moved(layer, expected, 0.1)
    assert layer.num_batches_tracked == 1


def test_bfloat16_and_eval_mode(device):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.bfloat16, residual=True), "relu")
    layer = layer_for(batch, device, activation="relu", momentum=1.0)
    compiled = Compiled(layer)
    assert_right(run(compiled, batch, "channels_last", device), expected, batch)
    statistics = layer.running_mean.cpu().double(), layer.running_var.cpu().double()
    batch, expected = expected_of(batch, "relu", statistics)
    layer.eval()
    results = run(compiled, batch, "channels_last", device)
    assert_near(results.y, expected.y, 4 * torch.finfo(torch.bfloat16).eps)
    assert_near(results.dx, expected.dx, 16 * torch.finfo(torch.bfloat16).eps)


def test_sizes_that_change_and_batches_that_do_not_count(device):
    batch = batch_of((8, 24, 14, 14), torch.float32)
    layer = layer_for(batch, device, activation="relu")
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for size in (8, 5, 3):
        x = batch.x[:size].to(device)
        assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    compiled(x * float("nan"))
    assert (layer.num_batches_tracked, layer.skipped_batches) == (3, 1)
    assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_fused_network_trains_as_that_of_torch(mode, device):
    """reduce-overhead records CUDA graphs."""
    torchs = Block()
    plain = copy.deepcopy(torchs).double()
    fused = copy.deepcopy(torchs).to(device)
    bnlab.convert(fused, bnlab.nn.BatchNorm2d, fuse=True, example=torch.randn(4, 3, 9, 9).to(device))
    compiled = torch.compile(fused, fullgraph=True, mode=mode)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05) for net in (plain, fused)]
    for _ in range(5):
        x = torch.randn(8, 3, 9, 9)
        for net, batch, optimizer in ((plain, x.double(), optimizers[0]), (compiled, x.to(device), optimizers[1])):
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert_close(fused.state_dict()[name].cpu().to(value.dtype), value, rtol=1e-3, atol=1e-3)
    assert fused.bn1.num_batches_tracked == 5


def test_exported_programs_run_on_the_device(device):
    batch = batch_of((4, 24, 14, 14), torch.float32)
    layer = layer_for(batch, device, activation="relu", momentum=1.0)
    layer(batch.x.to(device))
    x = batch.x.to(device)
    program = torch.export.export(layer.eval(), (x,)).module()
    assert_close(program(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_traced_layer_runs_on_the_device(device):
    batch = batch_of((4, 24, 14, 14), torch.float32)
    layer = layer_for(batch, device, activation="relu").eval()
    x = laid_out(batch.x, "channels_last", device)
    assert_close(torch.jit.trace(layer, x)(x), layer(x), rtol=1e-5, atol=1e-5)
