"""The eps of the training is inferred from running statistics, and nothing else is taken for it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import bnlab
from bnlab.checks.cases import healthy, model_layer, observed
from bnlab.errors import UsageError
from bnlab.observe.eps_fit import GRID, mismatch

BATCHES = [(0.03 * torch.randn(64, 6, generator=torch.Generator().manual_seed(i)) + 0.01,) for i in range(20)]


def network(eps, depth=3, *, gain=1.0):
    """Return a network with the settled statistics of its own eps, in eval mode; its weights have this gain."""
    torch.manual_seed(0)
    layers = []
    for place in range(depth):
        own = eps[place] if isinstance(eps, tuple) else eps
        layers += [nn.Linear(6 if place == 0 else 12, 12, bias=False), nn.BatchNorm1d(12, eps=own, momentum=None)]
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).train()
    with torch.no_grad():
        for layer in model[3:-1:3]:
            layer.weight *= gain
        for (x,) in BATCHES:
            model(x)
    for layer in bns(model):
        layer.momentum = 0.1
    return model.eval()


def bns(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def rebuilt(model, eps, places=None):
    other = copy.deepcopy(model)
    for place, layer in enumerate(bns(other)):
        if places is None or place in places:
            layer.eps = eps
    return other


def check(model, **options):
    return bnlab.check(model, data=BATCHES, train_data=BATCHES, **options)


def finding(model, **options):
    return next((f for f in check(model, **options).findings if f.code == "BN303"), None)


@pytest.mark.parametrize(("true", "other"), [(1e-3, 1e-5), (1e-2, 1e-5), (1e-4, 1e-2), (1e-3, 1e-1), (3e-4, 1e-5)])
def test_the_eps_of_the_training_is_named(true, other):
    result = finding(rebuilt(network(true), other))
    assert result.layer is None
    assert 0.5 <= result.measured["eps"].value / true <= 2
    assert f"eps is {other:g}, and the running statistics fit the training data with" in result.message


def test_an_eps_too_small_to_matter_is_an_upper_bound():
    result = finding(rebuilt(network(1e-9), 1e-3))
    assert "at most" in result.message
    assert result.measured["eps"].value <= 1e-5


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-2])
def test_the_right_eps_is_silent(eps):
    assert finding(network(eps)) is None


def test_a_single_layer_that_was_trained_with_another_eps_is_located():
    result = finding(rebuilt(network((1e-4, 1e-2, 1e-4, 1e-4), depth=4, gain=0.1), 1e-4))
    assert result.layer == "4"
    assert 0.5 <= result.measured["eps"].value / 1e-2 <= 2


def test_a_single_layer_with_another_eps_is_located():
    result = finding(rebuilt(network(1e-4, depth=4, gain=0.1), 1e-2, places={1}))
    assert result.layer == "4"
    assert 0.5 <= result.measured["eps"].value / 1e-4 <= 2


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_another_scale_of_the_input_is_no_other_eps(scale):
    """All layers behind the first look as if eps were different; the first one shows that the data are."""
    model = network(1e-3)
    scaled = [(scale * x,) for (x,) in BATCHES]
    codes = {f.code for f in bnlab.check(model, data=scaled, train_data=scaled).findings}
    assert "BN303" not in codes
    assert "BN401" in codes


def test_stale_statistics_are_no_other_eps():
    model = network(1e-5)
    for layer in bns(model):
        layer.running_var *= torch.rand(12, generator=torch.Generator().manual_seed(1)) * 4 + 0.2
    assert finding(model) is None


def test_a_single_bn_shows_nothing():
    assert finding(rebuilt(network(1e-3, depth=1), 1e-5)) is None
    notes = check(rebuilt(network(1e-3, depth=1), 1e-5), eps="infer").notes
    assert notes[0] == "eps cannot be inferred: eps moves the input of no BN layer by 0.05 standard deviations"


def test_the_model_is_unchanged():
    model = rebuilt(network(1e-3), 1e-5)
    state = copy.deepcopy(model.state_dict())
    check(model, eps="infer")
    assert [layer.eps for layer in bns(model)] == [1e-5] * 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_inferred_eps_is_used_for_the_check():
    diagnosis = check(rebuilt(network(1e-3), 1e-5), eps="infer")
    assert diagnosis.notes[0].startswith("eps 0.001 is inferred from train_data: ")
    assert {layer.eps for layer in diagnosis.layers} == {1e-3}
    assert not {"BN303", "BN401"} & {f.code for f in diagnosis.findings}


def test_an_eps_that_fits_stays():
    diagnosis = check(network(1e-3), eps="infer")
    assert diagnosis.notes[0].startswith("the eps of the layers fits train_data: ")
    assert {layer.eps for layer in diagnosis.layers} == {1e-3}


def test_statistics_that_fit_with_no_eps_infer_none():
    model = network(1e-5)
    for layer in bns(model):
        layer.running_mean += 1
    assert "fit train_data with no eps" in check(model, eps="infer").notes[0]


def test_the_mismatch_is_that_of_its_definition():
    """Squared differences over squared noise and 0.05 squared, averaged over the mean and the variance of channels."""
    seen = observed()
    layer = model_layer("bn", state=healthy(running_mean=(0.5, -0.7, 0.1, 1.2), running_var=(0.8, 4.0, 0.4, 1.1)))
    mean_noise, var_noise = seen.buffer_noise(0.1)
    expected = [
        (0.2**2 / 0.8) / (mean_noise[0] / 0.8 + 0.05**2),
        (math.log(2) / 2) ** 2 / (var_noise[1] / (4 * 2.0**2) + 0.05**2),
    ]
    assert mismatch(layer, seen) == pytest.approx(sum(expected) / 8)
    assert mismatch(model_layer("bn"), seen) == 0


def test_a_dead_channel_does_not_decide():
    seen = observed(var=(0.8, 0.0, 0.4, 1.1))
    value = mismatch(model_layer("bn"), seen)
    assert np.isfinite(value)
    assert value <= 400


def test_the_grid_spans_the_usual_values():
    assert GRID[0] == 1e-7
    assert GRID[-1] == 1e-1
    assert {1e-6, 1e-5, 1e-3} <= set(GRID)


def test_eps_is_inferred_with_training_data_only(tmp_path):
    model = network(1e-3)
    with pytest.raises(UsageError, match="eps: value must be a number without train_data, got 'infer'"):
        bnlab.check(model, data=BATCHES, eps="infer")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(UsageError, match="eps: value must be a number for a file, got 'infer'"):
        bnlab.check(tmp_path / "x.pt", eps="infer")
