import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnlab.functional import (
    fold_into_consumer,
    fold_into_producer,
    scale_and_shift,
)


def trained(channels, device):
    norm = nn.BatchNorm2d(channels).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.to(device)


def folding_of(norm):
    return scale_and_shift(norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data, norm.eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_folding_into_the_producer_keeps_the_output(bias, groups, transposed, device):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 6, 3, padding=1, groups=groups, bias=bias).to(device, torch.float64)
    norm = trained(6, device)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64).to(device)
    expected = norm(conv(x))
    scale, shift = folding_of(norm)
    weight, offset = fold_into_producer(
        scale, shift, conv.weight.data, conv.bias.data if bias else None, transposed=transposed, groups=groups
    )
    folded = kind(4, 6, 3, padding=1, groups=groups).to(device, torch.float64)
    folded.load_state_dict({"weight": weight, "bias": offset})
    assert_close(folded(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_folding_into_the_consumer_keeps_the_output_without_padding(bias, groups, device):
    norm = trained(4, device)
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=bias).to(device, torch.float64)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64).to(device)
    expected = conv(norm(x))
    weight, offset = fold_into_consumer(
        *folding_of(norm), conv.weight.data, conv.bias.data if bias else None, groups=groups
    )
    folded = nn.Conv2d(4, 6, 3, groups=groups).to(device, torch.float64)
    folded.load_state_dict({"weight": weight, "bias": offset})
    assert_close(folded(x), expected)


def test_a_linear_layer_folds_as_well(device):
    linear, norm = nn.Linear(3, 5).double(), nn.BatchNorm1d(5).double().eval()
    norm.running_mean.normal_()
    linear, norm = linear.to(device), norm.to(device)
    x = torch.randn(4, 3, dtype=torch.float64).to(device)
    weight, offset = fold_into_producer(*folding_of(norm), linear.weight.data, linear.bias.data)
    assert_close(nn.functional.linear(x, weight, offset), norm(linear(x)))
