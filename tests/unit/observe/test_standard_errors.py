"""Standard errors cover what they promise, over many independent channels whose true mean and variance are known."""

import math

import numpy as np
import pytest

from bnlab.observe.standard_errors import BatchTotals

CHANNELS = 2000
"""Independent channels, each of which is one trial of the promise."""


def normal(rng, count):
    return rng.standard_normal((count, CHANNELS))


def laplace(rng, count):
    return rng.laplace(size=(count, CHANNELS)) / math.sqrt(2)


def student(rng, count):
    return rng.standard_t(6, size=(count, CHANNELS)) / math.sqrt(1.5)


def images(rng, count):
    """Return the 9 positions of images: 90 % of their variance is common to an image."""
    common = np.repeat(rng.standard_normal((count, CHANNELS)), 9, 0)
    return math.sqrt(0.9) * common + math.sqrt(0.1) * rng.standard_normal((9 * count, CHANNELS))


def batches(draw, sizes, seed=0):
    rng = np.random.default_rng(seed)
    return (draw(rng, size) for size in sizes)


def pooled(values):
    """Return the pooled mean and variances in float64, their standard errors, and the number of values."""
    totals, everything, within = BatchTotals(CHANNELS), [], []
    for batch in values:
        totals.add(len(batch), batch.mean(0), batch.var(0, ddof=1))
        totals.end_batch()
        everything.append(batch)
        within.append(len(batch) * batch.var(0, ddof=1))
    rows = np.concatenate(everything)
    return rows.mean(0), rows.var(0, ddof=1), sum(within) / len(rows), totals.errors(), len(rows)


def coverage(mean, var, mean_error, var_error):
    """Return median and 95 % quantile of the errors of mean/std and ln(var)/2 in standard errors; the truth is 0, 1."""
    scores = np.abs(mean / mean_error), np.abs(np.log(var) / 2 / (var_error / var / 2))
    return [np.quantile(score, (0.5, 0.95)) for score in scores]


SIZES = {
    "equal": [16] * 30,
    "ragged": [3, 40, 17, 8, 25, 60, 5, 33, 12, 9, 28, 50, 4, 21, 36] * 2,
    "pairs": [2] * 60,
    "short last": [24] * 9 + [3],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("draw", [normal, laplace, student, images])
def test_errors_are_covered_as_a_standard_error_promises(draw, sizes):
    if draw is images:
        sizes = sizes[:12]
    mean, var, within, errors, _ = pooled(batches(draw, sizes))
    is_rough = draw is student or sum(sizes) < 250  # the variance of few or heavy-tailed values is skewed
    for median, high in coverage(mean, var, errors.mean, errors.population_var):
        assert 0.5 < median < 0.78
        assert 1.6 < high < (2.5 if is_rough else 2.2)
    if draw is not images:  # batches of 2 images cannot estimate a variance across images from within
        for median, high in coverage(mean, within, errors.mean, errors.within_var):
            assert 0.5 < median < 0.78
            assert 1.6 < high < (2.5 if is_rough else 2.2)


def test_the_test_catches_errors_that_count_positions_of_images():
    mean, var, *_, count = pooled(batches(images, [16] * 12))
    (median, high), _ = coverage(mean, var, np.sqrt(var / count), var * math.sqrt(2 / count))
    assert median > 1.5
    assert high > 4.5


def test_the_test_catches_errors_of_ragged_batches_with_equal_weights():
    sizes = [2] * 30 + [100] * 15
    rows = [batch.mean(0) for batch in batches(normal, sizes)]
    mean, var, _, errors, _ = pooled(batches(normal, sizes))
    wrong = np.std(rows, 0, ddof=1) / math.sqrt(len(rows))
    (median, _), _ = coverage(mean, var, wrong, errors.population_var)
    assert median < 0.3
    (median, high), _ = coverage(mean, var, errors.mean, errors.population_var)
    assert 0.55 < median < 0.75
    assert 1.8 < high < 2.1


def test_batches_that_differ_count_as_batches_in_mean_and_variance():
    """Each batch has a level of its own: 25 batches are 25 observations of it, however many values they have."""
    rng = np.random.default_rng(1)
    levels = [math.sqrt(0.5) * rng.standard_normal((1, CHANNELS)) for _ in range(25)]
    values = [level + math.sqrt(0.5) * rng.standard_normal((200, CHANNELS)) for level in levels]
    mean, var, _, errors, _ = pooled(values)
    (_, of_mean), (_, of_var) = coverage(mean, var, errors.mean, errors.population_var)
    assert 1.7 < of_mean < 2.15
    assert 1.7 < of_var < 3.1  # the variance of 25 levels is skewed
    _, wrong = coverage(mean, var, errors.mean, errors.within_var)  # leaves out that the levels differ
    assert wrong[1] > 8


def test_the_calls_of_a_batch_count_together():
    """A layer that runs twice on the same batch has learned nothing the second time."""
    once, twice = BatchTotals(CHANNELS), BatchTotals(CHANNELS)
    for batch in batches(normal, [8] * 20):
        call = len(batch), batch.mean(0), batch.var(0, ddof=1)
        once.add(*call)
        once.end_batch()
        twice.add(*call)
        twice.add(*call)
        mean, _ = twice.end_batch()
        np.testing.assert_allclose(mean, batch.mean(0), atol=1e-12)
    np.testing.assert_allclose(twice.errors().mean, once.errors().mean)
    assert twice.errors().batches == 20


def test_a_mean_far_from_zero_does_not_cancel():
    near, far = (pooled(shift + batch for batch in batches(normal, [16] * 10))[3] for shift in (0.0, 1e6))
    np.testing.assert_allclose(far.mean, near.mean, rtol=1e-6)
    np.testing.assert_allclose(far.population_var, near.population_var, rtol=1e-6)


@pytest.mark.parametrize("sizes", [[], [50], [2000, 4]])
def test_too_few_batches_have_no_standard_error(sizes):
    totals = BatchTotals(CHANNELS)
    for batch in batches(normal, sizes):
        totals.add(len(batch), batch.mean(0), batch.var(0, ddof=1))
        totals.end_batch()
    assert totals.errors() is None


def test_the_largest_names_channel_and_moment_and_leaves_constant_channels_out():
    totals = BatchTotals(3)
    for level in (-1.0, 1.0, -1.0, 1.0, 0.5):
        totals.add(100, np.array([7.0 + 1e-9 * level, level, 0.0]), np.array([0.0, 1.0, 2.0]))
        totals.end_batch()
    errors = totals.errors()
    largest = errors.largest(np.array([1e-18, 1.8, 2.0]), errors.population_var, 1e-5)
    assert (largest.channel, largest.of) == (1, "mean")
    assert largest.value == pytest.approx(errors.mean[1] / math.sqrt(1.8 + 1e-5))
    none = errors.largest(np.array([0.0, np.inf, np.inf]), np.zeros(3), 0.0)
    assert none.value == 0
