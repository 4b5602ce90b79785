import pytest
import torch
from torch import nn

import bnlab
from bnlab.watching.pooled_batches import Block, Pooled
from bnlab.watching.running_update import move_running_statistics

KINDS = [nn.BatchNorm2d, bnlab.nn.BatchNorm2d]


def pooled_of(x, rejected=0):
    x = x.double()
    count = float(x.numel() // x.size(1))
    return Pooled(Block(count, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0) * count), rejected)


def on_device(pooled):
    return Pooled(pooled.block._replace(count=torch.tensor(pooled.block.count)), torch.tensor(pooled.rejected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("is_on_device", [False, True])
def test_the_update_is_that_of_a_batch(kind, momentum, is_on_device):
    layer = kind(3, momentum=momentum)
    means, variances = [], []
    for step in range(3):
        x = torch.randn(5, 3, 4, 4) * (step + 1) + step
        pooled = pooled_of(x)
        move_running_statistics(layer, on_device(pooled) if is_on_device else pooled)
        means.append(x.double().mean((0, 2, 3)))
        variances.append(x.double().var((0, 2, 3)))
    weights = [1 / 3] * 3 if momentum is None else [0.081, 0.09, 0.1]
    first = 0 if momentum is None else 0.729
    mean = sum(weight * value for weight, value in zip(weights, means, strict=True))
    var = first + sum(weight * value for weight, value in zip(weights, variances, strict=True))
    assert int(layer.num_batches_tracked) == 3
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_only_a_device_knows_to_be_skipped_changes_nothing(kind):
    layer = kind(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    move_running_statistics(layer, on_device(pooled_of(torch.randn(5, 3, 4, 4), 2)), torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert int(getattr(layer, "skipped_batches", 0)) == 0
    move_running_statistics(layer, on_device(pooled_of(torch.randn(5, 3, 4, 4), 2)), torch.tensor(False))
    assert int(layer.num_batches_tracked) == 1
    assert int(getattr(layer, "skipped_batches", 2)) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "block", [None, Block(torch.tensor(0.0), torch.zeros(3), torch.zeros(3))], ids=["host", "device"]
)
def test_a_step_of_rejected_micro_batches_counts_nothing(kind, block):
    layer = kind(3)
    move_running_statistics(layer, Pooled(block, 3 if block is None else torch.tensor(3)))
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer.running_var, torch.ones(3))
    assert int(getattr(layer, "skipped_batches", 3)) == 3


def test_a_layer_of_torch_without_counter_and_momentum_stays():
    layer = nn.BatchNorm2d(3, momentum=None)
    layer.num_batches_tracked = None
    move_running_statistics(layer, pooled_of(torch.randn(5, 3, 4, 4)))
    assert torch.equal(layer.running_var, torch.ones(3))


def test_a_variance_beyond_the_dtype_stops_at_its_largest_number():
    layer = nn.BatchNorm2d(3).half()
    move_running_statistics(layer, Pooled(Block(4.0, torch.zeros(3).double(), torch.full((3,), 1e9).double()), 0))
    assert torch.equal(layer.running_var, torch.full((3,), 65504.0).half())
