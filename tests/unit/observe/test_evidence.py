import numpy as np
import pytest

from bnlab.checks._cases import healthy
from bnlab.observe.evidence import Hyperparameters, NetworkState

NETWORK = NetworkState(
    "",
    (
        healthy("a", running_var=(1, 4, -1, np.nan), weight=(2, -2, 1, 1), eps=0.0),
        healthy("b", running_mean=(7, 8), running_var=(0.25, 1), weight=None, bias=None, eps=0.75),
    ),
)


def test_columns_hold_every_channel_in_order():
    assert NETWORK.running_mean.tolist()[-2:] == [7, 8]
    assert NETWORK.weight.tolist() == [2, -2, 1, 1, 1, 1]
    assert NETWORK.bias.tolist()[-2:] == [0, 0]
    assert NETWORK.eps.tolist() == [0, 0, 0, 0, 0.75, 0.75]


def test_gain_is_undefined_where_the_root_is():
    assert NETWORK.gain[:2].tolist() == [2.0, 1.0]
    assert np.isnan(NETWORK.gain[2:4]).all()
    assert NETWORK.gain[4] == 1.0


def test_reduce_takes_finite_values_only():
    assert NETWORK.reduce(NETWORK.running_var, np.max) == [4, 1]
    assert np.isnan(NETWORK.reduce(np.full(6, np.nan), np.max)).all()


def test_where_leads_back_to_the_layers():
    found = [(layer.name, part, channels) for layer, part, channels in NETWORK.where(NETWORK.running_var == 1)]
    assert found == [("a", slice(0, 4), (0,)), ("b", slice(4, 6), (1,))]
    assert list(NETWORK.where(NETWORK.running_var > 99)) == []


def test_stated_hyperparameters_are_no_longer_assumed():
    assert Hyperparameters().stating(momentum=None) == Hyperparameters(None, 1e-5, ("eps",))
    assert Hyperparameters().stating(momentum=0.3, eps=1e-3) == Hyperparameters(0.3, 1e-3, ())


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "eps", "gain"])
def test_columns_are_as_long_as_the_channels(name):
    assert len(getattr(NETWORK, name)) == 6
