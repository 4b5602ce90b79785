import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

import bnlab
from bnlab.errors import UsageError
from bnlab.watching.class_forward import replaced_forward
from bnlab.watching.deferred_layer import DeferredLayer


def taken(layer, *calls, **keywords):
    """Return what a layer has after some calls."""
    deferred = DeferredLayer("bn", layer)
    with replaced_forward([(layer, deferred)]):
        for x in calls:
            layer(x, **keywords)
    return deferred.take()


def require(pooled, x):
    assert float(pooled.block.count) == x.numel() // x.size(1)
    channels = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(pooled.block.mean, channels.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled.block.statistics.var, channels.var(1, correction=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnlab.nn.BatchNorm2d, bnlab.nn.GhostBatchNorm2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_input_counts_in_every_dtype_and_layout(kind, dtype, layout):
    x = (torch.randn(6, 3, 4, 5) + 3).to(dtype).contiguous(memory_format=layout)
    layer = kind(3).to(dtype)
    require(taken(layer, x), x)
    assert int(layer.num_batches_tracked) == 0
    assert layer.track_running_stats


def test_a_mask_leaves_padding_out():
    x, lengths = torch.randn(4, 3, 10), torch.tensor([10, 4, 7, 2])
    mask = torch.arange(10) < lengths[:, None]
    layer = bnlab.nn.BatchNorm1d(3)
    x[~mask[:, None].expand_as(x)] = torch.nan
    pooled = taken(layer, x, mask=mask)
    kept = x.transpose(1, 2)[mask]
    require(pooled, kept)


def test_a_layer_that_runs_several_times_pools_all_calls():
    calls = [torch.randn(4, 3), torch.randn(5, 3) * 2 + 1, torch.randn(2, 3)]
    require(taken(nn.BatchNorm1d(3), *calls), torch.cat(calls))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False), bnlab.nn.FrozenBatchNorm1d(3)],
    ids=["eval mode", "no statistics", "frozen"],
)
def test_a_layer_that_updates_nothing_is_left_alone(layer):
    assert taken(layer, torch.randn(4, 3)) == (None, 0)


def test_a_frozen_layer_that_moves_its_statistics_waits_too():
    layer, x = bnlab.nn.FrozenBatchNorm1d(3, moves_statistics=True), torch.randn(4, 3) + 1
    require(taken(layer, x), x)
    assert torch.equal(layer.running_mean, torch.zeros(3))


class Transposed(nn.BatchNorm1d):
    """BN over the last dimension, by the forward of its base class."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OwnFormula(nn.BatchNorm1d):
    """What timm does: the operator of torch, with the settings of the layer."""

    def forward(self, x):
        tracks = self.training and self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        return batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps).relu()


class Stubborn(nn.BatchNorm1d):
    def forward(self, x):
        self.running_mean.lerp_(x.mean(0), 0.1)
        return x


def test_the_statistics_are_those_of_what_the_base_class_receives():
    x = torch.randn(4, 3, 3) * torch.tensor([1.0, 2.0, 3.0])
    require(taken(Transposed(3), x), x.transpose(1, 2))


def test_a_forward_with_the_operator_of_torch_can_wait():
    x, layer = torch.randn(4, 3), OwnFormula(3)
    require(taken(layer, x), x)
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("change", ["buffers", "input"])
def test_a_forward_that_updates_in_its_own_way_is_refused(change):
    class InPlace(nn.BatchNorm1d):
        def forward(self, x):
            return x.mul_(2)

    layer = Stubborn(3) if change == "buffers" else InPlace(3)
    with pytest.raises(UsageError, match=r"^bn: once_per_step must .* Use bnlab\.convert"):
        taken(layer, torch.randn(4, 3))
    assert layer.track_running_stats


def test_a_forward_that_raises_leaves_the_layer_as_it_was():
    layer = nn.BatchNorm1d(3)
    deferred = DeferredLayer("bn", layer)
    with replaced_forward([(layer, deferred)]):
        with pytest.raises(ValueError, match="expected 2D or 3D"):
            layer(torch.randn(4, 3, 2, 2))
        assert layer.track_running_stats
        layer(torch.randn(4, 3))
    assert deferred.take().block.count == 4


def test_a_transform_of_torch_updates_what_it_receives():
    layer = nn.BatchNorm1d(3)
    deferred = DeferredLayer("bn", layer)
    buffers = {name: value.clone() for name, value in layer.named_buffers()}

    def loss(x, buffers):
        return torch.func.functional_call(layer, buffers, (x,)).sum()

    with replaced_forward([(layer, deferred)]):
        torch.func.grad(loss)(torch.randn(4, 3), buffers)
    assert int(buffers["num_batches_tracked"]) == 1
    assert deferred.take() == (None, 0)
