"""The moments are compared with those of every permutation, and the score with exact probabilities."""

import itertools
import math
import statistics

import numpy as np
import pytest

from bnlab.observe.between_batches import between_batches, normal_score, shuffled_moments


def square_between(rows, sizes):
    """Return the sum of n |m|^2 over batches, batch by batch."""
    ends = np.cumsum(sizes)
    parts = [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return sum(size * (part.mean(0) ** 2).sum() for size, part in zip(sizes, parts, strict=True))


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (3, 2, 1), (1, 1, 1, 3)])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_the_moments_are_those_of_all_permutations(sizes, columns):
    rows = np.random.default_rng(columns).standard_t(3, (6, columns)) ** 3
    rows -= rows.mean(0)
    squares = [square_between(rows[list(places)], sizes) for places in itertools.permutations(range(6))]
    mean, variance = shuffled_moments(rows, sizes)
    assert mean == pytest.approx(np.mean(squares), rel=1e-9)
    assert variance == pytest.approx(np.var(squares), rel=1e-9)
    of_normal_samples = 2 * mean**2 / (len(sizes) - 1)  # of chi-square in one column: wrong for outliers
    assert variance != pytest.approx(of_normal_samples, rel=0.05)


@pytest.mark.parametrize("deviate", [1.0, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("freedom", [4, 10, 30])
def test_the_score_is_the_normal_deviate_of_the_same_probability(freedom, deviate):
    """For an even number m of degrees of freedom, P(chi-square > q) = exp(-q/2) sum (q/2)^k/k! over k < m/2."""
    low, high = 0.0, 1000.0
    wanted = statistics.NormalDist().cdf(-deviate)
    for _ in range(200):
        middle = (low + high) / 2
        terms = (middle / 2) ** np.arange(freedom // 2) / [math.factorial(k) for k in range(freedom // 2)]
        low, high = (middle, high) if math.exp(-middle / 2) * terms.sum() > wanted else (low, middle)
    ratio, variance = low / freedom, 2 / freedom
    assert normal_score(ratio, variance) == pytest.approx(deviate, abs=0.2)
    if deviate > 3:
        assert (ratio - 1) / math.sqrt(variance) > deviate + 0.5  # standard deviations alone claim too much


def test_a_ratio_that_cannot_vary_has_no_score():
    assert normal_score(1.0, 0.0) == 0.0


def classes(generator, batches, size, *, channels=6, kinds=4):
    """Return samples of classes with other means, and their classes, in random batches."""
    labels = generator.integers(kinds, size=batches * size)
    means = generator.normal(size=(kinds, channels))
    return means[labels] + 0.5 * generator.normal(size=(len(labels), channels)), labels


def cut(rows, size):
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def compared(batches, *, whole=None, resolution=0.0):
    sizes = [len(batch) for batch in batches] if whole is None else [whole] * len(batches)
    return between_batches(batches, sizes, np.full(batches[0].shape[1], resolution))


def test_the_ratio_is_that_of_the_analysis_of_variance():
    rows = np.array([0.0, 1, 2, 10, 11, 12, 5, 6, 7])[:, None]
    evidence = compared(cut(rows, 3))
    between, total = 3 * ((1 - 6) ** 2 + (11 - 6) ** 2), ((rows - 6) ** 2).sum()
    assert evidence.ratio == pytest.approx((between / 2) / (total / 8))
    assert (evidence.batches, evidence.samples) == (3, 3)


def test_the_ratio_and_the_score_are_those_of_drawn_permutations():
    generator = np.random.default_rng(0)
    rows, labels = classes(generator, 12, 10)
    rows = rows[np.argsort(labels, kind="stable")]
    sizes = (10,) * 11 + (6, 4)
    standard = (rows - rows.mean(0)) / rows.std(0)
    squares = [square_between(generator.permutation(standard), sizes) for _ in range(2000)]
    evidence = compared(np.split(rows, np.cumsum(sizes)[:-1]))
    ratio = square_between(standard, sizes) / np.mean(squares)
    assert evidence.ratio == pytest.approx(ratio, rel=0.02)
    assert evidence.z == pytest.approx(normal_score(ratio, np.var(squares) / np.mean(squares) ** 2), rel=0.05)
    assert evidence.z > 10


def test_channels_that_follow_one_quantity_count_as_one():
    rows = np.random.default_rng(0).normal(size=(80, 1))
    one, many = compared(cut(rows, 8)), compared(cut(rows * np.linspace(-3, 3, 32) + 7, 8))
    assert (many.ratio, many.z) == pytest.approx((one.ratio, one.z), rel=1e-9)
    independent = compared(cut(np.random.default_rng(0).normal(size=(80, 32)), 8))
    assert abs(independent.ratio - 1) < abs(one.ratio - 1)


def test_a_part_of_each_batch_shows_the_ratio_of_whole_batches():
    generator = np.random.default_rng(1)
    parts, whole = [], []
    for _ in range(30):
        batch = generator.normal(size=(128, 8)) + 0.4 * generator.normal(size=8)
        whole.append(batch)
        parts.append(batch[:32])
    evidence, of_whole = compared(parts, whole=128), compared(whole)
    assert evidence.ratio == pytest.approx(of_whole.ratio, rel=0.15)
    assert evidence.ratio > 3 * compared(parts).ratio
    assert evidence.z == compared(parts).z


@pytest.mark.parametrize("kind", ["classes", "one factor", "outliers", "nearly constant"])
@pytest.mark.parametrize(("batches", "size"), [(5, 16), (11, 16), (32, 4), (32, 32)])
def test_shuffled_samples_stay_below_the_limit_and_sorted_ones_exceed_it(kind, batches, size):
    generator = np.random.default_rng(batches)
    scores = []
    for _ in range(40):
        rows, labels = classes(generator, batches, size)
        if kind == "one factor":
            rows, labels = np.maximum(labels[:, None] - np.arange(4), 0) + 1e-3 * rows[:, :4], labels
        elif kind == "outliers":
            rows = rows**3
        elif kind == "nearly constant":
            rows = (generator.random(rows.shape) < 0.05) + 1e-3 * rows
        scores.append(compared(cut(rows, size)).z)
        if kind == "classes":
            assert compared(cut(rows[labels.argsort()], size)).z > 5
    assert max(scores) < 5
    assert -1 < np.mean(scores) < 1


def test_rounding_that_differs_between_batches_is_left_out():
    generator = np.random.default_rng(0)
    rows = np.concatenate([np.full((8, 1), 0.3 + 1e-8 * (index % 2)) for index in range(10)])
    alone = compared(cut(rows, 8), resolution=1e-6)
    assert (alone.ratio, alone.z) == (1.0, 0.0)
    assert compared(cut(rows, 8)).z > 5
    both = np.concatenate([rows, generator.normal(size=(80, 1))], 1)
    alone, beside = compared(cut(both[:, 1:], 8)), compared(cut(both, 8), resolution=1e-6)
    assert (beside.ratio, beside.z) == pytest.approx((alone.ratio, alone.z), rel=1e-9)


@pytest.mark.parametrize("batches", [[np.ones((4, 2))], [np.array([[1.0]]), np.array([[2.0]]), np.array([[9.0]])]])
def test_one_batch_and_single_samples_show_nothing(batches):
    evidence = compared(batches)
    assert (evidence.batches, evidence.ratio, evidence.z) == (len(batches), 1.0, 0.0)
