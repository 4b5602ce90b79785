"""Moments of blocks that arrive one by one, against rational arithmetic over all values."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bnlab.functional import Moments, StreamingMoments, merge
from bnlab.functional.streaming import merged_moments

values = st.floats(-1e6, 1e6, width=32)
weighted_values = st.lists(st.tuples(values, st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0])), min_size=1, max_size=12)


@pytest.fixture(params=["numpy", "torch"])
def array(request, device):
    """Return a function that makes the arrays of one library from lists of numbers."""
    if request.param == "numpy":
        return np.array
    return lambda numbers: torch.tensor(numbers, dtype=torch.float64, device=device)


def exact(weighted):
    """Sum of weights, mean and sum of squared deviations in rational arithmetic."""
    pairs = [(Fraction(value), Fraction(weight)) for value, weight in weighted]
    count = sum(weight for _, weight in pairs)
    mean = sum(value * weight for value, weight in pairs) / (count or 1)
    return float(count), float(mean), float(sum(weight * (value - mean) ** 2 for value, weight in pairs))


def agrees(moments, weighted):
    count, mean, m2 = exact(weighted)
    spread = 1e6 * max(count, 1.0)
    return (
        moments.count == pytest.approx(count)
        and float(moments.mean[0]) == pytest.approx(mean, rel=1e-10, abs=1e-8)
        and float(moments.m2[0]) == pytest.approx(m2, rel=1e-8, abs=1e-12 * spread)
    )


@given(weighted_values)
def test_values_with_weights_are_those_of_rational_arithmetic(array, weighted):
    moments = StreamingMoments(array([0.0]))
    for value, weight in weighted:
        moments.add(weight, array([value]))
    assert agrees(moments, weighted)


@given(st.lists(st.lists(values, max_size=8), min_size=1, max_size=5))
def test_rows_in_blocks_are_those_of_rational_arithmetic(array, blocks):
    moments = StreamingMoments(array([0.0]))
    for block in blocks:
        moments.add_rows(array(block).reshape(-1, 1))
    assert agrees(moments, [(value, 1.0) for block in blocks for value in block])


def test_blocks_with_deviations_of_their_own_merge_as_their_values(array):
    blocks = [[1e5, 2e5, 4e5], [7.0], [-3.0, 5.0]]
    moments = StreamingMoments(array([0.0]))
    for block in blocks:
        count, mean, m2 = exact([(value, 1.0) for value in block])
        moments.add(count, array([mean]), array([m2]))
    everything = [value for block in blocks for value in block]
    assert agrees(moments, [(value, 1.0) for value in everything])
    assert float(moments.var[0]) == pytest.approx(np.var(everything))
    assert float(moments.unbiased_var[0]) == pytest.approx(np.var(everything, ddof=1))


def test_nothing_is_zero_and_one_value_has_no_variance(array):
    moments = StreamingMoments(array([0.0, 0.0]))
    moments.add_rows(array([[1.0, 2.0]])[:0])
    assert (moments.count, moments.mean.tolist(), moments.var.tolist()) == (0, [0, 0], [0, 0])
    moments.add_rows(array([[1.0, 2.0]]))
    assert (moments.mean.tolist(), moments.var.tolist(), moments.unbiased_var.tolist()) == ([1, 2], [0, 0], [0, 0])


def test_rows_in_float32_are_summed_in_float64():
    rows = np.full((1 << 12, 1), 1e4, dtype=np.float32) + np.float32(2.0**-9) * (np.arange(1 << 12) % 2)[:, None]
    rows = rows.astype(np.float32)
    moments = StreamingMoments(np.zeros(1))
    moments.add_rows(rows)
    assert moments.mean.dtype == np.float64
    assert moments.mean[0] == pytest.approx(rows.astype(np.float64).mean(), rel=1e-15)


def test_the_zeros_it_starts_from_stay_zeros():
    zeros = np.zeros(1)
    StreamingMoments(zeros).add(2, np.ones(1))
    assert zeros[0] == 0


def test_the_oracle_catches_a_merge_that_forgets_how_far_apart_the_means_are():
    moments = StreamingMoments(np.zeros(1))
    moments.add(2, np.array([1.0]), np.array([2.0]))
    moments.m2 = moments.m2 + 2.0
    moments.mean, moments.count = np.array([4.0]), 4.0
    assert not agrees(moments, [(0.0, 1.0), (2.0, 1.0), (6.0, 1.0), (8.0, 1.0)])


def test_the_moments_of_functional_merge_by_the_same_formula(device):
    numbers = torch.tensor([[0.25, 0.0], [0.25, 2.0]], dtype=torch.float64, device=device)
    a, b = (Moments(count, mean.reshape(1), torch.zeros_like(mean).reshape(1)) for count, mean in numbers)
    both = merge(a, b)
    assert_close((both.count, both.mean, both.m2), merged_moments(a.count, a.mean, a.m2, b.count, b.mean, b.m2))
    assert (float(both.mean), float(both.m2)) == (1.0, 0.5)  # weights that add up to less than 1 count as they are
