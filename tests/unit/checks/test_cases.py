import numpy as np
import pytest

from bnlab.checks.cases import healthy, model_layer, observed


def test_a_healthy_layer_holds_the_statistics_of_its_data():
    state, seen = healthy(), observed()
    np.testing.assert_array_equal(state.running_mean, seen.within_mean)
    np.testing.assert_array_equal(state.running_var, seen.within_var)


def test_the_gap_of_a_healthy_layer_is_what_chance_and_bessel_explain():
    gap = model_layer().gap
    assert gap.excess == pytest.approx(0, abs=1e-6)
    assert sum(gap.by_cause.values()) == pytest.approx(gap.square)


def test_stale_statistics_show_in_the_gap():
    gap = model_layer(state=healthy(running_mean=(0.3, -0.7, 0.1, 5.2))).gap
    assert gap.staleness == pytest.approx(4 / np.sqrt(1.1) / 2, rel=0.05)
