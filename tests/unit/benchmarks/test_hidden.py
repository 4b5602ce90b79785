"""The benchmark of hidden settings counts what it says."""

import dataclasses

import pytest
from benchmarks.mishaps import hidden

RESULT = hidden.Rebuilt("mlp", 0, 1e-3, 1e-5, 0.1, change=0.5, inferred=1e-3, codes=("BN303",))


@pytest.mark.trains
def test_a_network_is_rebuilt_and_its_eps_inferred():
    result = hidden.rebuilt("mlp", 0, 1e-3, 1e-5, 0.03)
    assert result.change > hidden.MATTERS
    assert result.is_within_a_factor_of_two


@pytest.mark.parametrize(
    ("inferred", "near"), [(1e-3, True), (2e-3, True), (5e-4, True), (2.1e-3, False), (None, False)]
)
def test_a_factor_of_two_is_near(inferred, near):
    assert dataclasses.replace(RESULT, inferred=inferred).is_within_a_factor_of_two is near


def test_the_headline_counts_networks_in_which_eps_matters():
    missed = dataclasses.replace(RESULT, inferred=None)
    faint = dataclasses.replace(RESULT, change=0.1, inferred=None)
    wrong = dataclasses.replace(RESULT, inferred=1e-1)
    others = [hidden.Other("right", "mlp", 0, 1.0, ()), hidden.Other("stale", "mlp", 0, 1.0, ("BN303",))]
    assert hidden.headline([RESULT, missed, faint, wrong], others) == (
        "hidden: eps detected in 2 of 3 networks whose outputs move by more than 0.2 std, within a factor of 2 in 1 of "
        "2; false findings in 1 of 2 networks with the right eps"
    )
