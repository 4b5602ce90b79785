"""A verdict that hangs on the assumed momentum says from which momentum on it changes."""

import dataclasses
import re

import numpy as np
import pytest

from bnlab.checks.bn105_statistics_barely_updated import StatisticsBarelyUpdated
from bnlab.checks.cases import healthy, network, untrained
from bnlab.diagnosis.assumptions import assumed_defaults, assumption_behind, eps_that_matters
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence, Hyperparameters

ALL = Settings.of()
SMALL = {"running_var": (0.02, 2, 0.02, 1)}
"""Variances so small that the initial 1 matters in them as soon as its weight is 1 %."""


def assumed(name="bn", *, momentum=None, **changes):
    """Return a layer of a state dict, whose momentum is that of torch; or a stated one."""
    layer = healthy(name, **changes)
    known = Hyperparameters() if momentum is None else Hyperparameters().stating(momentum=momentum)
    return dataclasses.replace(layer, hyperparameters=known)


def findings_at(momentum, *layers):
    check = StatisticsBarelyUpdated()
    stated = [dataclasses.replace(one, hyperparameters=Hyperparameters().stating(momentum=momentum)) for one in layers]
    judged = [one for one in stated if check.lacks(one) is None]
    return list(check.inspect(network(*judged)))


@pytest.mark.parametrize("count", [44, 60, 100, 1000, 4000])
def test_the_bound_is_the_momentum_from_which_the_check_fires(count):
    layer = assumed(num_batches_tracked=count, **SMALL)
    text = assumption_behind(ALL, [network(layer)], [])
    bound = 1 - 0.01 ** (1 / count)
    assert text == f"BN105 would fire at a momentum below {bound:.3g} (0.1 is assumed)"
    assert findings_at(bound * 0.999, layer)
    assert not findings_at(bound * 1.001, layer)
    assert not findings_at(0.1, layer)


@pytest.mark.parametrize("count", [44, 100])
def test_the_bound_is_lower_where_the_initial_values_matter_less(count):
    """For a mean of 1.2 and a variance of 1.1 they matter from a weight w on, where w/(1-w) 1.2/sqrt(v) is 0.1."""
    layer = assumed(num_batches_tracked=count)
    bound = float(re.search(r"below ([\d.]+) ", assumption_behind(ALL, [network(layer)], []))[1])
    weight = (1 - bound) ** count
    assert weight / (1 - weight) * 1.2 / np.sqrt((1.1 - weight) / (1 - weight)) == pytest.approx(0.1, rel=0.02)
    assert findings_at(bound * 0.995, layer)
    assert not findings_at(bound * 1.005, layer)


def test_data_like_the_initial_values_rest_on_no_assumption_on_the_momentum():
    layer = assumed(num_batches_tracked=3000, running_mean=(0.01, 0, 0, 0), running_var=(1, 1, 1, 1))
    assert assumption_behind(ALL, [network(layer)], []) is None


@pytest.mark.parametrize("count", [5000, 100_000])
def test_a_momentum_that_nobody_uses_is_no_assumption(count):
    """The bound is about 4.6/k, and 0.001 is the smallest momentum in use."""
    assert assumption_behind(ALL, [network(assumed(num_batches_tracked=count))], []) is None


def test_a_small_variance_proves_that_the_momentum_is_not_small():
    """The initial variance 1 would still weigh 1 %, and 0.005 is less than that."""
    old = assumed(num_batches_tracked=100, running_var=(0.005, 2, 0.4, 1))
    young = assumed(num_batches_tracked=100, running_var=(0.011, 2, 0.4, 1))
    assert assumption_behind(ALL, [network(old)], []) is None
    assert assumption_behind(ALL, [network(young)], []) is not None


def test_the_layer_with_the_fewest_updates_counts():
    layers = [assumed("a", num_batches_tracked=100), assumed("b", num_batches_tracked=50, **SMALL), assumed("c")]
    bound = 1 - 0.01 ** (1 / 50)
    for networks in ([network(*layers)], [network(one) for one in layers]):
        assert assumption_behind(ALL, networks, []).startswith(f"BN105 would fire at a momentum below {bound:.3g} ")


@pytest.mark.parametrize(
    "layer",
    [
        assumed(num_batches_tracked=100, momentum=0.1),
        assumed(num_batches_tracked=None),
        assumed(num_batches_tracked=0),
        assumed(num_batches_tracked=-5),
        assumed(num_batches_tracked=100, settled=True),
        assumed(num_batches_tracked=100, running_mean=(0.0, 0.0, 0.0, 0.0)),
        dataclasses.replace(assumed(num_batches_tracked=100), trained_with=True),
    ],
    ids=["stated", "no counter", "counter 0", "negative counter", "settled", "means of 0", "trained with them"],
)
def test_other_layers_rest_on_no_assumption(layer):
    assert assumption_behind(ALL, [network(layer)], []) is None


@pytest.mark.parametrize(("code", "is_none"), [("BN105", True), ("BN104", True), ("BN102", False)])
def test_a_finding_on_the_age_replaces_the_assumption(code, is_none):
    finding = next(StatisticsBarelyUpdated().inspect(network(healthy(num_batches_tracked=2))))
    text = assumption_behind(
        ALL, [network(assumed(num_batches_tracked=100))], [dataclasses.replace(finding, code=code)]
    )
    assert (text is None) is is_none


@pytest.mark.parametrize(
    ("settings", "is_none"),
    [
        (Settings.of(select=["BN104"]), True),
        (Settings.of(ignore={"BN105": "few epochs"}), True),
        (Settings.of(select=["BN105"]), False),
        (Settings.of(ignore={"BN104": "few epochs"}), False),
    ],
    ids=["not selected", "ignored", "selected", "another one ignored"],
)
def test_a_check_that_does_not_report_rests_on_no_assumption(settings, is_none):
    text = assumption_behind(settings, [network(assumed(num_batches_tracked=100))], [])
    assert (text is None) is is_none


def test_the_bound_follows_the_limit_of_the_check():
    settings = Settings.of(limits={"BN105": {"initial_weight": 0.1}})
    text = assumption_behind(settings, [network(assumed(num_batches_tracked=100))], [])
    assert text.startswith(f"BN105 would fire at a momentum below {1 - 0.1 ** (1 / 100):.3g} ")


def test_nothing_rests_on_an_assumption_without_layers():
    assert assumption_behind(ALL, [], []) is None
    assert assumption_behind(ALL, [network(untrained())], []) is None


def test_the_bound_has_three_digits():
    text = assumption_behind(ALL, [network(assumed(num_batches_tracked=77, **SMALL))], [])
    assert float(re.search(r"below ([\d.]+) ", text)[1]) == pytest.approx(1 - 0.01 ** (1 / 77), rel=5e-3)


def test_an_assumed_eps_that_matters_is_noted_for_the_layer_where_it_matters():
    """sqrt((5e-4 + 1e-3) / (5e-4 + 1e-5)) is 1.715."""
    small = assumed("conv1.bn", running_var=(5e-4,) * 4)
    (note,) = eps_that_matters(Evidence((network(assumed("a"), small),)))
    assert note == (
        "conv1.bn has variances of 0.0005: eps between 1e-05 and 0.001 changes its output by 71 %. State the eps of "
        "the training with eps= or --eps"
    )


@pytest.mark.parametrize(
    "layer",
    [
        assumed(running_var=(0.1,) * 4),
        healthy(running_var=(5e-4,) * 4),
        dataclasses.replace(untrained(), hyperparameters=Hyperparameters()),
        assumed(running_var=(float("nan"),) * 4),
        assumed(running_var=(-1.0,) * 4),
    ],
)
def test_an_eps_that_is_stated_or_does_not_matter_is_not_noted(layer):
    assert list(eps_that_matters(Evidence((network(layer),)))) == []


def test_the_defaults_of_each_library_are_noted_with_their_layers():
    keras = dataclasses.replace(healthy("b"), hyperparameters=Hyperparameters().of_house("Keras", 0.01, 1e-3))
    stated = dataclasses.replace(healthy("c"), hyperparameters=keras.hyperparameters.stating(eps=1e-3))
    assert list(assumed_defaults(Evidence((network(assumed("a"), keras, stated),)), 3)) == [
        "momentum 0.1 is assumed in 1 of 3 layers: a state dict does not hold it",
        "momentum 0.01, the default of Keras, is assumed in 2 of 3 layers: the file does not hold it",
        "eps 1e-05 is assumed in 1 of 3 layers: a state dict does not hold it",
        "eps 0.001, the default of Keras, is assumed in 1 of 3 layers: the file does not hold it",
    ]
