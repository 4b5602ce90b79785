import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnlab.errors import UsageError
from bnlab.remedies.drop_bias import DropBias
from bnlab.remedies.remedy import Material

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def network(**options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)).double()
    model(X.double())
    return model


def drop(model, *, layers=("1",)):
    return DropBias().apply(model, layers, Material(batches=[X.double()]))


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=["statistics", "none"])
def test_the_output_stays_in_either_mode_and_the_bias_comes_back(options, device):
    model = network(**options).to(device)
    before, bias = copy.deepcopy(model), model[0].bias
    receipt = drop(model)
    assert model[0].bias is None
    for training in (True, False):
        assert_close(
            copy.deepcopy(model).train(training)(X.double().to(device)),
            copy.deepcopy(before).train(training)(X.double().to(device)),
        )
    receipt.undo()
    assert model[0].bias is bias


def test_the_running_mean_loses_what_the_bias_gave_it(device):
    model = network().to(device)
    mean, bias = model[1].running_mean.clone(), model[0].bias.detach().clone()
    drop(model.eval())
    assert_close(model[1].running_mean, mean - bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: nn.Sequential(nn.ReLU(), model[1]), "no layer with a bias feeds this layer alone"),
        (
            lambda model: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False).double(), model[1]),
            "no layer with a bias feeds this layer alone",
        ),
    ],
    ids=["no producer", "no bias"],
)
def test_a_layer_without_a_bias_of_its_own_is_left_alone(change, reason, device):
    model = change(network()).to(device)
    batch = X.double() if isinstance(model[0], nn.Conv2d) else torch.randn(6, 4, 5, 5, dtype=torch.float64).to(device)
    receipt = DropBias().apply(model, ["1"], Material(batches=[batch]))
    assert not receipt.changes.changes
    assert receipt.changes.left_alone[0].reason.startswith(reason)


def test_undo_is_refused_where_there_is_a_bias_again(device):
    model = network().to(device)
    receipt = drop(model)
    model[0].bias = nn.Parameter(torch.zeros(4).to(device).double())
    with pytest.raises(UsageError, match="undo: 0 must still have no bias, got one"):
        receipt.undo()


@pytest.mark.parametrize(
    ("outcome", "error"),
    [({"output": 0.5}, UsageError), (KeyboardInterrupt, KeyboardInterrupt)],
    ids=["wrong", "ended"],
)
def test_whatever_raises_the_model_is_as_it_was(monkeypatch, outcome, error, device):
    def differences(*_):
        if isinstance(outcome, dict):
            return outcome
        raise outcome

    model = network().to(device)
    bias, mean = model[0].bias, model[1].running_mean.clone()
    monkeypatch.setattr("bnlab.remedies.drop_bias.differences", differences)
    with pytest.raises(error):
        drop(model)
    assert model[0].bias is bias
    assert torch.equal(model[1].running_mean, mean)
