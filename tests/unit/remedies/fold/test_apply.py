import copy

import pytest
import torch
from tests.architectures import images
from tests.unit.remedies.fold.samples import check, evaluated, folded_into, reasons, trained
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.remedies.fold.fold import fold


def test_layouts_requires_grad_and_dtypes_stay(device):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))).to(device)
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = fold(model, images(2).to(device)).model
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    assert isinstance(folded[0].bias, nn.Parameter)
    assert folded[2].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_beside_float32_statistics(dtype, device):
    model = (
        trained(nn.Sequential(nn.Conv2d(3, 4, 3), bnlab.nn.BatchNorm2d(4), nn.ReLU(), bnlab.nn.BatchNorm2d(4)))
        .to(device)
        .to(dtype)
    )
    assert model[1].running_var.dtype == torch.float32
    x = images(2).to(device).to(dtype)
    receipt = fold(model, x)
    assert folded_into(receipt) == {"1": "0", "3": "scale and shift"}
    assert {tensor.dtype for tensor in receipt.model.parameters()} == {dtype}
    assert receipt.model(x).dtype == dtype
    exact = evaluated(copy.deepcopy(model).double(), x.double())
    assert (receipt.model(x).double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1, bias=False), nn.Linear(16, 4, bias=False)])
def test_affine_false_and_bias_false(layer, device):
    norm = (
        nn.BatchNorm2d(4, affine=False).to(device)
        if isinstance(layer, nn.Conv2d)
        else nn.BatchNorm1d(4, affine=False).to(device)
    )
    x = images(2).to(device) if isinstance(layer, nn.Conv2d) else torch.randn(3, 16).to(device)
    check(nn.Sequential(layer, norm).to(device), x.double(), **{"1": "0"})


def test_a_grouped_transposed_convolution(device):
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, 2, groups=2), nn.BatchNorm2d(4)).to(device)
    check(model, torch.randn(2, 6, 5, 5, dtype=torch.float64).to(device), **{"1": "0"})


def test_a_variance_of_zero_in_half_precision(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-8)).to(device).half()
    model[1].running_var[2] = 0.0  # eps is 0 in float16
    x = 1e-3 * images(2).to(device).half()
    receipt = fold(model, x)
    assert folded_into(receipt) == {"1": "0"}
    assert_close(receipt.model(x), evaluated(model, x), rtol=1e-2, atol=30)
    assert receipt.model[0].weight[2].abs().max() > 100
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-12)).to(device).half()
    model[1].running_var[2] = 0.0
    with torch.no_grad():
        model[0].weight[2] = 1.0
    receipt = fold(model, 0 * images(2).to(device).half())
    assert reasons(receipt) == {"1": "when it is folded, the weight of 0 is not finite in float16"}
    assert type(receipt.model[1]) is nn.BatchNorm2d
    assert torch.equal(receipt.model[0].weight, model[0].weight)
    model[1].eps = 0.0
    assert reasons(fold(model, images(2).to(device).half())) == {"1": "running_var + eps is 0: its scale is infinite"}
