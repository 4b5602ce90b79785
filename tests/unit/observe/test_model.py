import numpy as np
import pytest
import torch
from tests.samples import small_network
from torch import nn

from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.model import read_model, with_stored_layers
from bnlab.observe.programs.graph_layers import INSTANCE_NORM


def layers(model, known=None):
    return [layer for network in read_model(model, known or Hyperparameters()).networks for layer in network.layers]


def test_the_numbers_of_every_layer():
    model = small_network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer_states = layers(model)
    assert [layer.name for layer in layer_states] == ["1", "4"]
    assert np.array_equal(layer_states[0].running_var, model[1].running_var.double().numpy())
    assert layer_states[0].num_batches_tracked == 60
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_momentum_and_eps_are_those_of_the_layer_unless_stated():
    model = nn.BatchNorm2d(3, momentum=None, eps=1e-3)
    assert layers(model)[0].hyperparameters == Hyperparameters(None, 1e-3, ())
    assert layers(model, Hyperparameters().stating(momentum=0.2))[0].hyperparameters == Hyperparameters(0.2, 1e-3, ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    (layer,) = layers(nn.BatchNorm1d(3).to(dtype))
    assert layer.dtype == layer.affine_dtype == str(dtype).removeprefix("torch.")


def test_evidence_does_not_change_with_the_model():
    model = nn.BatchNorm1d(3, dtype=torch.float64)
    (layer,) = layers(model)
    model.running_var.fill_(9)
    assert layer.running_var.tolist() == [1, 1, 1]


def test_other_classes_with_running_statistics():
    model = nn.Sequential(
        nn.SyncBatchNorm(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchNorm3d(3, affine=False)
    )
    assert [layer.name for layer in layers(model)] == ["0", "2"]
    assert layers(model)[1].weight is None
    left = read_model(model, Hyperparameters()).left_alone
    assert left == (("1", INSTANCE_NORM),)


def test_an_odd_counter_is_no_counter():
    layer = nn.BatchNorm1d(3)
    layer.num_batches_tracked = torch.tensor([1, 2, 3])
    assert layers(layer)[0].num_batches_tracked is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), "keeps no running statistics"),
        (nn.BatchNorm2d(3, device="meta"), "has running statistics without values"),
        (nn.LazyBatchNorm2d(), "has running statistics without values"),
    ],
)
def test_layers_without_running_statistics_are_left_alone(module, reason):
    evidence = read_model(nn.Sequential(module), Hyperparameters())
    assert evidence.networks == ()
    assert evidence.left_alone[0][0] == "0"
    assert reason in evidence.left_alone[0][1]


def test_layers_of_which_only_the_numbers_are_known_join_the_others():
    holder = nn.Module()
    holder.register_buffer("running_mean", torch.arange(3.0))
    holder.register_buffer("running_var", torch.ones(3))
    broken = nn.Module()
    broken.register_buffer("running_mean", torch.zeros(2, 2))
    broken.register_buffer("running_var", torch.zeros(2, 2))
    before = read_model(nn.Sequential(nn.BatchNorm1d(2)), Hyperparameters())
    evidence = with_stored_layers(before, {"a": holder, "b": broken}, [("c", "is folded")], Hyperparameters())
    (network,) = evidence.networks
    assert [layer.name for layer in network.layers] == ["0", "a"]
    assert network.layers[1].running_mean.tolist() == [0, 1, 2]
    assert network.layers[1].hyperparameters.assumed == ("momentum", "eps")
    assert [name for name, _ in evidence.left_alone] == ["c", "b"]
