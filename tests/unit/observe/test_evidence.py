import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlab.checks.cases import healthy
from bnlab.observe.evidence import Hyperparameters, NetworkState, Pruned

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


def test_the_norm_of_a_filter_is_1_where_it_is_not_known():
    known = healthy(running_mean=(7, 8), running_var=(1, 1), weight=None, bias=None, filter_norms=(2, 3))
    assert NetworkState("", (healthy(), known)).filter_norms.tolist() == [1, 1, 1, 1, 2, 3]


def test_gain_is_undefined_where_the_root_is():
    assert NETWORK.gain[:2].tolist() == [2.0, 1.0]
    assert np.isnan(NETWORK.gain[2:4]).all()
    assert NETWORK.gain[4] == 1.0


@given(st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_ranges_take_finite_values_only(values):
    network = NetworkState("", (healthy(running_mean=values, running_var=values, weight=None, bias=None),))
    finite = [value for value in values if math.isfinite(value)]
    expected = (min(finite), pytest.approx(statistics.median(finite)), max(finite)) if finite else None
    assert network.ranges(network.running_var) == [expected]


def test_ranges_of_the_largest_numbers():
    network = NetworkState("", (healthy(running_var=(1e308, 1.5e308, 1.7e308, 1e308)),))
    assert network.ranges(network.running_var) == [(1e308, 1.25e308, 1.7e308)]


def test_where_leads_back_to_the_layers():
    places = [(layer.name, part, channels) for layer, part, channels in NETWORK.where(NETWORK.running_var == 1)]
    assert places == [("a", slice(0, 4), (0,)), ("b", slice(4, 6), (1,))]
    assert list(NETWORK.where(NETWORK.running_var > 99)) == []


def test_stated_hyperparameters_are_no_longer_assumed():
    assert Hyperparameters().stating(momentum=None) == Hyperparameters(None, 1e-5, ("eps",))
    assert Hyperparameters().stating(momentum=0.3, eps=1e-3) == Hyperparameters(0.3, 1e-3, ())
    assert Hyperparameters(0.3, 1e-5, ("eps",)).stating(momentum=0.2, eps=1e-3) == Hyperparameters(0.3, 1e-3, ())


@pytest.mark.parametrize(
    "name", ["running_mean", "running_var", "weight", "bias", "eps", "gain", "pruned", "filter_norms"]
)
def test_columns_are_as_long_as_the_channels(name):
    assert len(getattr(NETWORK, name)) == 6


def test_pruned_channels_are_a_column():
    layers = (healthy("a"), healthy("b", pruned=Pruned((0, 3), ("conv",))), healthy("c", pruned=Pruned((1,), ("fc",))))
    column = NetworkState("", layers).pruned
    assert np.flatnonzero(column).tolist() == [4, 7, 9]
    assert Pruned.of(column[4:8], ("conv",)) == layers[1].pruned
    assert not NETWORK.pruned.any()
