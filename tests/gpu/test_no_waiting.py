"""The CPU never waits for the GPU in a forward pass, a backward pass, or an update of the running statistics."""

from __future__ import annotations

import pytest
import torch
from tests import oracle
from tests.gpu import hardware as gpu
from tests.gpu.cases import batch_of, laid_out, layer_for

import bnlab

pytestmark = pytest.mark.usefixtures("hardware")

FORMS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "leaky relu": {"activation": "leaky_relu"},
    "gelu": {"activation": "gelu"},
    "cumulative": {"momentum": None},
    "propagate": {"nonfinite": "propagate"},
    "untracked": {"track_running_stats": False},
    "wide": {"statistics_dtype": torch.float64},
}
KINDS = [bnlab.nn.BatchNorm2d, bnlab.nn.FrozenBatchNorm2d, bnlab.nn.GhostBatchNorm2d, bnlab.nn.BatchRenorm2d]
SHAPE = (8, 16, 14, 14)


def steps(layer, x, residual=None, mask=None):
    """Return a function that runs a layer forward and backward in either mode."""
    leaf = x.detach().requires_grad_()

    def run():
        for training in (True, False):
            y = layer.train(training)(leaf, residual, mask=mask)
            y.sum().backward()

    return run


def assert_never_waits(function):
    function()  # compiles, and loads what is loaded once
    with gpu.no_waiting():
        function()


def test_waiting_is_noticed(hardware):
    x = torch.ones(3, device=hardware)
    assert gpu.waits(lambda: float(x.sum())) == 1
    with pytest.raises(RuntimeError, match="synchronizing"), gpu.no_waiting():
        float(x.sum())
    assert gpu.waits(lambda: x + x) == 0


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layers(options, layout, dtype, device):
    batch = batch_of(SHAPE, dtype, residual=True)
    layer = layer_for(batch, device, **options)
    x, residual = laid_out(batch.x, layout, device), laid_out(batch.residual, layout, device)
    assert_never_waits(steps(layer, x))
    assert_never_waits(steps(layer, x, residual))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weights", ["bool", "float"])
def test_a_mask(layout, weights, device):
    batch = batch_of(SHAPE, torch.float32, masked=True)
    mask = batch.mask.to(device)
    layer = layer_for(batch, device, activation="relu")
    mask = mask.bool() if weights == "bool" else mask
    assert_never_waits(steps(layer, laid_out(batch.x, layout, device), mask=mask))


@pytest.mark.parametrize("kind", KINDS)
def test_the_variants(kind, device):
    layer = kind(16, activation="relu", **({"ghost_size": 4} if "Ghost" in kind.__name__ else {})).to(device)
    assert_never_waits(steps(layer, batch_of(SHAPE, torch.float32).x.to(device)))
    layer.requires_grad_(True)
    assert_never_waits(steps(layer, batch_of(SHAPE, torch.float32).x.to(device)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.filterwarnings("ignore:.*running_var must be finite:bnlab.errors.BnlabWarning")
def test_a_batch_that_does_not_count_or_is_huge(value, device):
    x = batch_of(SHAPE, torch.float32).x.clone()
    x[0, 0, 0, 0] = value
    layer = layer_for(batch_of(SHAPE, torch.float32), device)
    assert_never_waits(steps(layer, x.to(device)))


@pytest.mark.parametrize("shape", [(1, 16, 1, 2), (0, 16, 4, 4), (64, 16, 1, 1)])
def test_small_and_empty_batches(shape, device):
    x = torch.zeros(shape, device=device)
    layer = layer_for(batch_of(SHAPE, torch.float32), device)
    assert_never_waits(steps(layer, x))


def test_autocast(device):
    batch = batch_of(SHAPE, torch.float32)
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 1), layer_for(batch, torch.device("cpu"), activation="relu"))
    net, x = net.to(device), batch.x.to(device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            y = net(x)
        y.float().sum().backward()

    assert_never_waits(step)


def test_float64(device):
    batch = batch_of(SHAPE, torch.float64)
    layer = layer_for(batch, device, activation="relu").double()
    assert_never_waits(steps(layer, batch.x.to(device)))


def test_a_step_of_training(device):
    layers = [torch.nn.Conv2d(16, 16, 3, padding=1, bias=False), bnlab.nn.BatchNorm2d(16, activation="relu")]
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(16, 16, 1), bnlab.nn.BatchNorm2d(16)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = batch_of(SHAPE, torch.float32).x.to(device)

    def step():
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    assert_never_waits(step)
