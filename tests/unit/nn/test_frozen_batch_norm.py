import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab


def layer_and_input():
    layer = bnlab.nn.FrozenBatchNorm2d(8)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer, 3 + torch.randn(4, 8, 6, 6)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_eval_mode_whatever_a_parent_says(training):
    layer, x = layer_and_input()
    witness = nn.BatchNorm2d(8).eval()
    witness.load_state_dict(layer.state_dict())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    model = nn.Sequential(layer).train(training)
    assert_close(model(x), witness(x))
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def bytes_saved(layer, x):
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return max(saved, default=0)


def test_nothing_of_the_size_of_the_input_is_saved():
    layer, x = layer_and_input()
    x.requires_grad_()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert bytes_saved(layer, x) <= 8
    assert bytes_saved(nn.BatchNorm2d(8).eval().requires_grad_(False), x) >= x.numel()


def test_its_affine_can_be_trained_all_the_same():
    layer, x = layer_and_input()
    layer.requires_grad_(True)
    layer.train()(x).sum().backward()
    assert_close(layer.bias.grad, torch.full((8,), 4 * 36.0))


def test_one_value_per_channel_is_enough():
    assert bnlab.nn.FrozenBatchNorm1d(3).train()(torch.randn(1, 3)).shape == (1, 3)


def test_where_the_statistics_are_withheld_nothing_is_counted():
    layer, x = layer_and_input()
    layer.running_mean = layer.running_var = None
    layer(x)
    assert layer.num_batches_tracked == 0
