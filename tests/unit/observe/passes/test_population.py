"""Imposed statistics hold inside the block, whatever the model does, and are gone after it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnlab.observe.passes.population import impose_batch_statistics, impose_statistics, layers_read_by_others


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).eval()


def test_batch_statistics_hold_in_eval_mode_too(model):
    x, buffers = 5 + 2 * torch.randn(64, 3), dict(model[0].named_buffers())
    with impose_batch_statistics(model):
        y = model.eval()(x)
    assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(y.var(0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    assert all(value is buffers[name] for name, value in model[0].named_buffers())


def test_eval_mode_uses_the_imposed_statistics(model):
    x = torch.randn(4, 3)
    mean, var = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 9.0, 16.0]).double()
    with impose_statistics({model[0]: (mean.numpy(), var.numpy())}):
        y = model(x)
    assert_close(y, ((x - mean) / (var + 1e-5).sqrt()).float())
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_running_statistics_are_restored_when_the_block_raises(model):
    mean = model[0].running_mean
    with pytest.raises(RuntimeError), impose_batch_statistics(model):
        raise RuntimeError
    assert model[0].running_mean is mean


class Fused(nn.Module):
    """Scales by the running variance of its BN layer, as the fused modules of torch.ao do."""

    def __init__(self):
        super().__init__()
        self.freeze_bn = False
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        scale = (self.bn.running_var + self.bn.eps).sqrt()
        return self.bn(x * scale / scale)


def test_statistics_that_another_module_reads_are_withheld_only_while_the_layer_runs():
    model, x = Fused().eval(), 5 + 2 * torch.randn(64, 3)
    assert layers_read_by_others(model) == {model.bn}
    buffers = dict(model.named_buffers())
    with impose_batch_statistics(model):
        y = model(x)
        assert model.bn.running_var is buffers["bn.running_var"]
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4))
        assert model.bn.running_var is buffers["bn.running_var"]
    assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert not model.bn._forward_hooks
    assert not layers_read_by_others(nn.Sequential(nn.BatchNorm1d(3)))
