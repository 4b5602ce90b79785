"""The weight of the initial values is (1 - a)^k, computed here by running the average."""

import dataclasses

import numpy as np
import pytest

from bnlab.checks.cases import healthy, untrained
from bnlab.observe.evidence import Pruned
from bnlab.observe.initial_values import (
    has_initial_values,
    initial_effect,
    initial_weight,
    is_barely_updated,
    updates_needed,
    weight_that_matters,
    why_counter_is_wrong,
)


@pytest.mark.parametrize(("momentum", "updates"), [(0.1, 44), (0.01, 100), (1.0, 1), (0.5, 3)])
def test_the_weight_is_that_of_a_moving_average(momentum, updates):
    average = 1.0
    for _ in range(updates):
        average = (1 - momentum) * average  # the data are 0, so that only the initial 1 is left
    assert initial_weight(healthy(num_batches_tracked=updates, momentum=momentum)) == pytest.approx(average)
    if 0 < average < 1:
        assert updates_needed(momentum, average) == pytest.approx(updates)


def test_a_cumulative_average_and_an_absent_counter_keep_no_weight():
    assert initial_weight(healthy(momentum=None)) == 0
    assert initial_weight(healthy(num_batches_tracked=None)) == 0


def test_momentum_0_never_settles():
    assert updates_needed(0.0, 0.01) == float("inf")


def test_initial_values_are_exactly_0_and_1():
    assert has_initial_values(untrained())
    assert not has_initial_values(healthy(running_mean=(0, 0, 0, 1e-30), running_var=(1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_batches_tracked": None}, "absent"),
        ({"num_batches_tracked": -1}, "negative"),
        ({"num_batches_tracked": 0}, "is 0 although"),
        ({"num_batches_tracked": 2}, "contradict running_var"),
        ({"num_batches_tracked": 1000}, None),
        ({"num_batches_tracked": 2, "momentum": None}, None),
        ({"num_batches_tracked": 2, "running_var": (2, 2, 2, 2)}, None),
    ],
)
def test_a_counter_that_contradicts_the_buffers_is_wrong(changes, reason):
    message = why_counter_is_wrong(healthy(**changes))
    assert (message is None) if reason is None else (reason in message)


EPS = 1e-5


def after(updates, momentum, means, variances):
    """Return the state of a layer whose every batch has exactly these statistics: the average is run here."""
    mean, var = np.zeros(len(means)), np.ones(len(means))
    for _ in range(updates):
        mean = (1 - momentum) * mean + momentum * np.asarray(means)
        var = (1 - momentum) * var + momentum * np.asarray(variances)
    return healthy(running_mean=mean, running_var=var, num_batches_tracked=updates, momentum=momentum)


def effect_on_outputs(state, means, variances):
    """Return the effect from the statistics of the data, which the tool does not know."""
    spread = np.sqrt(np.asarray(variances) + EPS)
    of_mean = np.abs(means - state.running_mean) / spread
    of_var = np.abs(np.log(np.sqrt(state.running_var + EPS) / spread))
    return np.maximum(of_mean, of_var)


@pytest.mark.parametrize(("updates", "momentum"), [(90, 0.001), (3, 0.1), (40, 0.1), (400, 0.01)])
def test_the_effect_is_that_against_the_statistics_of_the_data(updates, momentum):
    data = np.array([0.0, 2.0, -0.01, 0.5]), np.array([1.0, 0.3, 4.0, 1e-6])
    state = after(updates, momentum, *data)
    weight = initial_weight(state)
    np.testing.assert_allclose(initial_effect(state, weight), effect_on_outputs(state, *data), rtol=1e-4, atol=1e-9)
    assert initial_effect(state, weight)[0] == pytest.approx(0, abs=1e-12)
    wrong = initial_effect(state, 0.9 * weight)  # half the weight would be seen
    assert not np.allclose(wrong, effect_on_outputs(state, *data), rtol=1e-2)


def normal_layer(seed, *, var=1.0, mean=0.0, updates=60, momentum=0.01, channels=16, values=1000):
    """Return the state after updates with batches of a normal distribution."""
    rng = np.random.default_rng(seed)
    running = np.zeros(channels), np.ones(channels)
    for _ in range(updates):
        x = mean + np.sqrt(var) * rng.standard_normal((values, channels))
        running = tuple(
            (1 - momentum) * old + momentum * new
            for old, new in zip(running, (x.mean(0), x.var(0, ddof=1)), strict=True)
        )
    return healthy(
        running_mean=running[0], running_var=running[1], weight=None, bias=None,
        num_batches_tracked=updates, momentum=momentum,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("updates", "momentum"), [(60, 0.01), (3, 0.1), (200, 0.001)])
def test_initial_values_matter_unless_the_data_are_like_them(seed, updates, momentum):
    options = {"updates": updates, "momentum": momentum}
    like, tiny, bright = (normal_layer(seed, **options, **data) for data in ({}, {"var": 1e-6}, {"mean": 2.0}))
    assert initial_weight(like) == initial_weight(tiny) > 0.01
    assert [why_counter_is_wrong(state) for state in (like, tiny, bright)] == [None] * 3
    assert [is_barely_updated(state) for state in (like, tiny, bright)] == [False, True, True]


def test_settled_statistics_keep_no_initial_values_whatever_the_data():
    """44 updates with momentum 0.1 is the count of a recalibrated layer, whose variances may be small."""
    assert not is_barely_updated(healthy(running_var=(0.02,) * 4, num_batches_tracked=44))
    assert is_barely_updated(healthy(running_var=(0.02,) * 4, num_batches_tracked=43))


@pytest.mark.parametrize("state", [untrained(num_batches_tracked=5), healthy(num_batches_tracked=None)])
def test_untrained_layers_and_absent_counters_are_not_barely_updated(state):
    assert not is_barely_updated(state)


def test_a_share_of_the_channels_counts_and_pruned_channels_do_not():
    state = after(30, 0.1, np.zeros(20), [1e-4] + [1.0] * 19)
    assert not is_barely_updated(state)
    assert is_barely_updated(state, channels=0.05)
    two = after(30, 0.1, np.zeros(20), [1e-4] * 2 + [1.0] * 18)
    assert is_barely_updated(two)
    assert not is_barely_updated(dataclasses.replace(two, pruned=Pruned((0, 1), ("conv",))))
    assert not is_barely_updated(dataclasses.replace(two, pruned=Pruned(tuple(range(20)), ("conv",))))


def test_values_that_are_not_finite_have_no_effect():
    state = healthy(running_mean=(np.nan, 0, np.inf, 0), running_var=(1, np.nan, 1, np.inf))
    assert np.isfinite(initial_effect(state, 0.5)).all()
    assert initial_effect(healthy(running_var=(0, 0, 0, 0), eps=0.0), 0.0).max() <= 1e6


@pytest.mark.parametrize("seed", range(20))
def test_the_weight_that_matters_is_where_the_rule_changes(seed):
    rng = np.random.default_rng(seed)
    state = healthy(running_mean=rng.normal(0, 0.1, 4), running_var=np.exp(rng.normal(0, 0.5, 4)))
    bound = weight_that_matters(state)
    candidates = np.linspace(0.0101, min(1.0, state.running_var.min()) * 0.9999, 400)
    fires = [(initial_effect(state, weight) > 0.1).mean() >= 0.1 for weight in candidates]
    if bound is None:
        assert not any(fires)
    else:
        assert fires == [weight > bound for weight in candidates]


def test_no_weight_matters_where_the_variance_is_below_it():
    assert weight_that_matters(healthy(running_var=(0.009, 1, 1, 1))) is None
    assert weight_that_matters(healthy(running_var=(0.011, 1, 1, 1))) == 0.01
    assert weight_that_matters(untrained()) is None
    assert weight_that_matters(healthy(running_mean=(0.01, 0, 0, 0), running_var=(1, 1, 1, 1))) > 0.8
