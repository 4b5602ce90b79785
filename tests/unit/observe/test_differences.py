"""The differences of two estimates are those of the normalised outputs."""

import math

import numpy as np
import pytest

from bnlab.observe.differences import differences


def test_differences_have_the_unit_of_the_reference_and_their_signs():
    mean, var = np.array([3.0, -1.0]), np.array([15.0, 3.0])
    of_mean, of_var = differences(mean, var, np.array([1.0, 0.0]), np.array([3.0, 15.0]), 1.0)
    assert of_mean == pytest.approx([2 / math.sqrt(4), -1 / math.sqrt(16)])
    assert of_var == pytest.approx([math.log(2), -math.log(2)])


def test_equal_statistics_do_not_differ():
    values = np.array([0.5, 2.0])
    assert [side.tolist() for side in differences(values, values, values, values, 1e-5)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("var", [0.0, -1.0, np.nan])
def test_a_variance_that_is_none_gives_no_number_and_no_warning(var):
    bad, good = np.array([var]), np.array([1.0])
    of_mean, _ = differences(good, good, good, bad, 0.0)
    _, of_var = differences(good, bad, good, good, 0.0)
    assert not np.isfinite(of_mean).any()
    assert not np.isfinite(of_var).any()
