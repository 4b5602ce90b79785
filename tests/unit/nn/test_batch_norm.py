"""BatchNorm1d, BatchNorm2d and BatchNorm3d against torch's layers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab

PAIRS = [
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (16, 5)),
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (8, 5, 7)),
    (bnlab.nn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 7)),
    (bnlab.nn.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 4, 5)),
]


pairs = pytest.mark.parametrize(("bnlab_class", "torch_class", "shape"), PAIRS)


BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


@pairs
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False}],
)
def test_a_drop_in_for_torchs_layer(bnlab_class, torch_class, shape, options):
    torch.manual_seed(0)
    layer, witness = bnlab_class(5, **options), torch_class(5, **options)
    assert layer.state_dict().keys() == witness.state_dict().keys()
    for tensor in witness.parameters():
        tensor.data.normal_()
    layer.load_state_dict(witness.state_dict())
    for mode in (True, True, True, False):
        layer.train(mode)
        witness.train(mode)
        x = 2 + 3 * torch.randn(shape)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(left), witness(right)
        assert_close(y, z)
        y.cos().sum().backward()
        z.cos().sum().backward()
        assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    assert_close(layer.state_dict(), witness.state_dict())
    witness.load_state_dict(layer.state_dict())
    assert isinstance(layer, torch_class.__mro__[1])


def test_the_running_statistics_are_exact():
    layer, x = BatchNorm1d(1, affine=False), torch.tensor([[1e5], [2e5]])
    assert_close(layer.eval()(x).flatten(), torch.tensor([99999.5, 199999.0]))
    layer.train()
    assert_close(layer(x).flatten(), torch.tensor([-1.0, 1.0]))
    assert (layer.running_mean.item(), layer.running_var.item()) == (15000, pytest.approx(5.0e8, rel=1e-6))
    layer(x)
    assert (layer.running_mean.item(), layer.running_var.item()) == (28500, pytest.approx(9.5e8, rel=1e-6))
    assert_close(layer.eval()(x).flatten(), torch.tensor([2.3198, 5.5642]), rtol=0, atol=5e-5)


def program_1(second, layer, steps=400):
    """The network of huge-gap (docs/lab.md): Linear(1, 1), BN, sigmoid; inputs 1 and `second`, targets 0 and 1.

    The linear layer gets its gradient but is held where it is. That gradient is nothing but rounding, and Adam, which
    divides it by its own size, would walk the weight about at random: to where nothing overflows, and through 0.
    """
    model = nn.Sequential(nn.Linear(1, 1), layer, nn.Sigmoid())
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.04)
    x, target = torch.tensor([[1.0], [second]]), torch.tensor([[0.0], [1.0]])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
    assert model[0].weight.grad.isfinite()
    return loss.item()


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore::bnlab.errors.BnlabWarning")
@pytest.mark.parametrize("second", [2.0, 2e13, 3e19, 1e20, 1e30, 1e38])
def test_program_1_keeps_learning_however_far_the_inputs_are_apart(second):
    assert program_1(second, BatchNorm1d(1)) < 0.005


@pytest.mark.trains
def test_program_1_is_stuck_with_torchs_layer_from_1e20_on():
    assert program_1(3e19, nn.BatchNorm1d(1)) < 0.005
    assert program_1(1e20, nn.BatchNorm1d(1)) == pytest.approx(0.5, abs=1e-3)
