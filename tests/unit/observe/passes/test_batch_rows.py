"""The rows of the batches are compared with the statistics that were added."""

import numpy as np
import pytest

from bnlab.observe.passes.batch_rows import BatchRows, spread_channels


def test_rows_are_standardised():
    rows = BatchRows(3)
    for mean, var in (((1, 2, 3), (1, 4, 9)), ((3, 2, 0), (1, 1, 36))):
        rows.add(np.array(mean, dtype=float), np.array(var, dtype=float))
    expected = [
        [(1 - 2) / 2, (2 - 2) / 3, (3 - 1) / 6, np.log(1 / 4) / 2, np.log(4 / 9) / 2, np.log(9 / 36) / 2],
        [(3 - 2) / 2, (2 - 2) / 3, (0 - 1) / 6, np.log(1 / 4) / 2, np.log(1 / 9) / 2, np.log(36 / 36) / 2],
    ]
    center, spread = np.array([2.0, 2, 1]), np.array([3.0, 8, 35])
    np.testing.assert_allclose(rows.standardised(center, spread, 1.0)[:, :3], np.array(expected)[:, :3])
    np.testing.assert_allclose(rows.standardised(center, spread + 1, 0.0)[:, 3:], np.array(expected)[:, 3:])


def test_eps_is_part_of_both_variances():
    rows = BatchRows(1)
    rows.add(np.array([4.0]), np.array([7.0]))
    row = rows.standardised(np.array([0.0]), np.array([3.0]), 1.0)[0]
    assert row == pytest.approx([4 / 2, np.log(8 / 4) / 2])


def test_at_most_32_channels_are_kept_and_they_cover_the_layer():
    rows = BatchRows(2048)
    rows.add(np.arange(2048.0), np.ones(2048))
    kept = rows.standardised(np.zeros(2048), np.ones(2048), 0.0)[0, :32]
    assert (kept[0], kept[-1]) == (0, 2047)
    assert np.diff(kept).min() > 60
    few = BatchRows(5)
    few.add(np.arange(5.0), np.ones(5))
    assert few.standardised(np.zeros(5), np.ones(5), 0.0).shape == (1, 10)


def test_channels_are_spread_over_the_layer():
    assert spread_channels(1).tolist() == [0]
    assert spread_channels(32).tolist() == list(range(32))
    many = spread_channels(100)
    assert (len(many), many[0], many[-1]) == (32, 0, 99)
    assert set(np.diff(many)) == {3, 4}


def test_memory_is_bounded_and_groups_in_turn_stay_visible():
    """Every second of 1024 batches in two groups that alternate would be of one group."""
    rows = BatchRows(1)
    for batch in range(1024):
        rows.add(np.array([float(batch)]), np.ones(1))
    kept = rows.standardised(np.zeros(1), np.ones(1), 0.0)[:, 0]
    assert len(kept) == 256
    assert len(set(kept)) == 256
    assert 0.35 < np.mean(kept % 2 == 0) < 0.65
    assert 0.35 < np.mean(kept < 512) < 0.65
    again = BatchRows(1)
    for batch in range(1024):
        again.add(np.array([float(batch)]), np.ones(1))
    np.testing.assert_array_equal(again.standardised(np.zeros(1), np.ones(1), 0.0)[:, 0], kept)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_constant_channel_is_finite(eps):
    rows = BatchRows(2)
    rows.add(np.array([5.0, 1e-200]), np.array([0.0, 1e300]))
    assert np.isfinite(rows.standardised(np.array([5.0, 0.0]), np.array([0.0, 1e300]), eps)).all()
