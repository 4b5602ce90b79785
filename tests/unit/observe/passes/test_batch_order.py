"""Successive batches that are alike are seen, and shuffled ones are not taken for such."""

import itertools
import math

import numpy as np
import pytest

from bnlab.observe.passes.batch_order import SuccessiveRows, is_ordered, order_score


def test_the_score_is_that_over_all_orders_of_the_rows():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 3)) * [1, 2, 0.3]
    rows[:, 1] += rows[:, 0]
    centred = rows - rows.mean(0)
    sums = [
        sum(centred[a] @ centred[b] for a, b in itertools.pairwise(order)) for order in itertools.permutations(range(6))
    ]
    expected = (sums[0] - np.mean(sums)) / np.std(sums)
    assert order_score(rows) == pytest.approx(expected)


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("common", [False, True])
def test_shuffled_rows_have_a_score_near_a_normal_deviate(draw, common):
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(800):
        rows = getattr(rng, draw)(size=(16, 1 if common else 8))
        scores.append(order_score(np.repeat(rows, 8, 1) if common else rows))
    assert abs(np.mean(scores)) < 0.12
    assert 0.9 < np.std(scores) < 1.1
    assert np.mean([is_ordered([score]) for score in scores]) < 0.01


def test_runs_of_classes_and_drifts_are_ordered():
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.standard_normal((24, 4))
    assert is_ordered([order_score(np.repeat([[0.0], [1.0], [0.0], [1.0]], 6, 0) + noise)])
    assert is_ordered([order_score(np.linspace(0, 2, 24)[:, None] + noise)])
    assert not is_ordered([order_score(np.array([0.0, 1.0] * 12)[:, None] + noise)])  # two domains in turn


def test_more_layers_need_a_larger_score():
    assert is_ordered([3.5])
    assert not is_ordered([3.5] + [0.0] * 49)
    assert not is_ordered([])


def test_rows_that_differ_by_rounding_alone_are_in_no_order():
    assert order_score(1e-8 * np.arange(30.0)[:, None]) == 0
    assert order_score(np.zeros((3, 2))) == 0


def test_long_data_are_merged_and_still_seen():
    def score(level, count=3000):
        rng = np.random.default_rng(0)
        rows = SuccessiveRows(64)
        for index in range(count):
            rows.add(level(index) + 0.3 * rng.standard_normal(64), np.ones(64))
        return rows.score(np.zeros(64), np.ones(64), 1e-5)

    assert is_ordered([score(lambda index: index // 300 % 2)])
    assert not is_ordered([score(lambda _: 0.0)])
    assert SuccessiveRows(3).score(np.zeros(3), np.ones(3), 0.0) == 0


def test_a_variance_of_zero_and_a_change_of_variance():
    rows = SuccessiveRows(2)
    for index in range(30):
        rows.add(np.zeros(2), np.array([0.0, 4.0 if index < 15 else 1.0]))
    score = rows.score(np.zeros(2), np.array([0.0, 2.5]), 0.0)
    assert math.isfinite(score)
    assert is_ordered([score])
