"""The weight of the initial values is (1 - a)^k, computed here by running the average."""

import pytest

from bnlab.checks.cases import healthy, untrained
from bnlab.observe.initial_values import has_initial_values, initial_weight, updates_needed, why_counter_is_wrong


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
