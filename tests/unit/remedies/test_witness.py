import pytest
import torch
from torch import nn

from bnlab.remedies import witness
from bnlab.remedies.witness import difference, differences, fixed_weights, largest

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())


def test_a_model_agrees_with_itself_and_is_untouched(device):
    model = network().to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evidence = witness.behaviour_of(model, X.to(device))
    assert set(evidence) == {
        f"{what} in {mode} mode" for what in ("output", "gradients", "buffers") for mode in ("train", "eval")
    }
    assert set(differences(evidence, witness.behaviour_of(model, X.to(device))).values()) == {0.0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_autograd(device):
    model = nn.Linear(4, 1, bias=False).to(device)
    x_grad, weight_grad = witness.behaviour_of(model, X.to(device))["gradients in eval mode"]
    weights = torch.arange(6, dtype=torch.float64).to(device).cos().float()
    torch.testing.assert_close(x_grad, weights[:, None] * model.weight)
    torch.testing.assert_close(weight_grad, (weights[:, None] * X.to(device)).sum(0, keepdim=True))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda model: model[1].running_mean.add_(1), "output in eval mode"),
        (lambda model: model[1].running_mean.add_(1), "buffers in train mode"),
        (lambda model: model[0].weight.data.mul_(-1), "output in train mode"),
        (lambda model: model[0].weight.data.mul_(2), "gradients in train mode"),
    ],
)
def test_a_difference_shows_where_it_is(change, where, device):
    model, other = network().to(device), network().to(device)
    change(other)
    assert differences(witness.behaviour_of(model, X.to(device)), witness.behaviour_of(other, X.to(device)))[where] > 0


def test_another_shape_or_dtype_is_an_infinite_difference_and_nan_equals_nan(device):
    left = {"output": [torch.tensor([1.0, torch.nan]).to(device), None]}
    assert differences(left, {"output": [torch.tensor([1.0, torch.nan]).to(device), None]}) == {"output": 0.0}
    assert differences(left, {"output": [torch.tensor([1.5, torch.nan]).to(device), None]}) == {"output": 0.5}
    assert differences(left, {"output": [torch.tensor([1.0]).to(device), None]}) == {"output": float("inf")}
    assert differences(left, {"output": [left["output"][0].double(), None]}) == {"output": float("inf")}
    assert differences(left, {"output": [left["output"][0], torch.ones(1).to(device)]}) == {"output": float("inf")}


def test_gradients_are_compared_on_the_scale_of_the_largest_gradient_of_the_model(device):
    rounding, other = torch.tensor([3e-9, -2e-9]).to(device), torch.tensor([-1e-9, 1e-9]).to(device)
    before = {"gradients in train mode": [torch.tensor([2.0]).to(device), rounding], "output in train mode": [rounding]}
    after = {"gradients in train mode": [torch.tensor([2.0]).to(device), other], "output in train mode": [other]}
    assert differences(before, after)["gradients in train mode"] == pytest.approx(2e-9)
    assert differences(before, after)["output in train mode"] == pytest.approx(4 / 3)
    wrong = {**after, "gradients in train mode": [torch.tensor([2.0]).to(device), torch.tensor([0.1, 0.0]).to(device)]}
    assert differences(before, wrong)["gradients in train mode"] == pytest.approx(0.05)
    nothing = {"gradients in train mode": [torch.zeros(1).to(device), None]}
    assert differences(nothing, nothing) == {"gradients in train mode": 0.0}


def test_a_difference_is_measured_on_a_scale(device):
    left, right = torch.tensor([2.0, -8.0, float("nan")]).to(device), torch.tensor([3.0, -8.0, float("nan")]).to(device)
    assert difference(left, right, 4.0) == 0.25
    assert difference(left, right, None) == 0.125
    assert difference(None, None, 1.0) == 0.0
    assert difference(left, None, 1.0) == difference(left, left.double(), 1.0) == float("inf")
    assert difference(torch.tensor([float("inf")]).to(device), torch.tensor([1.0]).to(device), 1.0) > 1e300
    assert largest(torch.tensor([1.0, -3.0, float("inf"), float("nan")]).to(device)) == 3.0
    assert largest(None) == largest(torch.empty(0).to(device)) == 0.0


def test_weights_are_fixed_and_have_the_form_of_the_output(device):
    for output in (torch.ones(2, 3).to(device), torch.ones(6, dtype=torch.float64).to(device)):
        weights = fixed_weights(output)
        assert (weights.shape, weights.dtype) == (output.shape, output.dtype)
        assert weights.flatten()[4].item() == pytest.approx(-0.6536436, abs=1e-6)  # cos(4)
