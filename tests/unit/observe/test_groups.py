"""Groups of batches are compared with scikit-learn, whose k-means and silhouettes are independent of ours."""

import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from bnlab.observe.groups import clusters, number_of_groups, silhouette


def blobs(groups, *, batches=24, dimensions=8, noise=0.1, seed=0):
    """Return the statistics of batches of some groups in turn, which are equally far apart, and the group of each."""
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.normal(size=(max(groups, dimensions),) * 2))
    labels = np.arange(batches) % groups
    return 2 * rotation[labels] + noise * generator.normal(size=(batches, len(rotation))), labels


def counted(rows):
    """Return the number of groups at one layer."""
    return number_of_groups([rows])


def noise_alone(batches, dimensions, seed):
    """Return statistics of shuffled batches, whose channels are correlated for every second seed."""
    rows = np.random.default_rng(seed).normal(size=(batches, dimensions))
    return rows * np.exp(-np.arange(dimensions)) if seed % 2 else rows


@pytest.mark.parametrize(("groups", "noise"), [*itertools.product([2, 3, 5, 8], [0.05, 0.5, 2.0])])
def test_silhouettes_are_those_of_scikit_learn(groups, noise):
    rows, labels = blobs(groups, noise=noise, batches=40)
    assert silhouette(rows, labels) == pytest.approx(silhouette_score(rows, labels), abs=1e-9)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert silhouette(rows, shuffled) == pytest.approx(silhouette_score(rows, shuffled), abs=1e-9)


def test_the_silhouette_of_rows_far_from_zero_is_the_same():
    rows, labels = blobs(3)
    assert silhouette(rows + 1e6, labels) == pytest.approx(silhouette(rows, labels), abs=1e-6)


def test_the_silhouette_of_four_points_by_hand():
    """Points 0 and 1 against 10 and 12: (b - a)/max(a, b) is 10/11, 9/10, 7.5/9.5 and 9.5/11.5."""
    rows = np.array([[0.0], [1.0], [10.0], [12.0]])
    assert silhouette(rows, np.array([0, 0, 1, 1])) == pytest.approx(np.mean([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5]))


def test_a_row_that_is_alone_has_the_silhouette_0():
    rows = np.array([[0.0], [1.0], [10.0]])
    assert silhouette(rows, np.array([0, 0, 1])) == pytest.approx(np.mean([9 / 10, 8 / 9, 0]))
    assert silhouette(rows, np.array([0, 0, 1])) == pytest.approx(silhouette_score(rows, [0, 0, 1]))
    assert silhouette(rows, np.zeros(3, dtype=int)) == 0
    assert silhouette(np.zeros((4, 2)), np.array([0, 0, 1, 1])) == 0


def test_distances_within_all_clusters_would_be_a_wrong_silhouette():
    """A mean over the own cluster that counts the row itself is too small; the oracle catches it."""
    rows, labels = blobs(3, noise=0.5)
    distances = np.sqrt(((rows[:, None] - rows) ** 2).sum(2))
    same = labels[:, None] == labels
    own = (distances * same).sum(1) / same.sum(1)  # should be divided by the others only
    nearest = np.array(
        [
            min(row[labels == other].mean() for other in {0, 1, 2} - {label})
            for row, label in zip(distances, labels, strict=True)
        ]
    )
    wrong = ((nearest - own) / np.maximum(own, nearest)).mean()
    assert wrong > silhouette_score(rows, labels) + 0.01
    assert silhouette(rows, labels) < wrong - 0.01


def inertia(rows, labels):
    return sum(((rows[labels == k] - rows[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels))


@pytest.mark.parametrize(("groups", "noise", "seed"), [*itertools.product([2, 3, 5, 8], [0.1, 0.5], range(3))])
def test_clusters_are_as_tight_as_those_of_scikit_learn(groups, noise, seed):
    rows, labels = blobs(groups, noise=noise, batches=48, seed=seed)
    reference = KMeans(groups, n_init=20, random_state=0).fit(rows)
    assert inertia(rows, clusters(rows, groups)) <= 1.02 * reference.inertia_
    if noise == 0.1:
        assert adjusted_rand_score(labels, clusters(rows, groups)) == 1


def test_clusters_of_noise_are_as_tight_as_those_of_scikit_learn():
    for seed, count in itertools.product(range(5), (2, 4, 8)):
        rows = noise_alone(64, 6, seed)
        reference = KMeans(count, n_init=20, random_state=0).fit(rows)
        assert inertia(rows, clusters(rows, count)) <= 1.1 * reference.inertia_


def test_the_same_rows_always_give_the_same_clusters():
    rows, _ = blobs(5, noise=0.8)
    first = clusters(rows, 5)
    np.random.default_rng().normal(size=9)
    np.testing.assert_array_equal(clusters(rows.copy(), 5), first)
    reordered = np.random.default_rng(0).permutation(len(rows))
    tight, labels = blobs(5)
    assert adjusted_rand_score(clusters(tight[reordered], 5), labels[reordered]) == 1


def test_more_clusters_than_distinct_rows():
    rows = np.repeat(np.eye(3), 4, 0)
    assert len(set(clusters(rows, 6).tolist())) == 3


@pytest.mark.parametrize(("groups", "seed"), [*itertools.product([2, 3, 5, 8], range(4))])
def test_distinct_groups_are_counted(groups, seed):
    rows, _ = blobs(groups, batches=6 * groups, seed=seed)
    assert counted(rows) == groups


def test_groups_of_different_sizes_are_counted():
    rows, _ = blobs(3, batches=60, noise=0.05)
    keep = np.r_[np.arange(0, 60, 3), [1, 4, 7], [2, 5, 8, 11]]
    assert counted(rows[np.sort(keep)]) == 3


@pytest.mark.parametrize("batches", [10, 12, 24, 64])
def test_shuffled_batches_have_no_groups(batches):
    """With one channel as with 32, whether they are correlated or not."""
    for dimensions, seed in itertools.product((2, 4, 64), range(240 // batches)):
        assert counted(noise_alone(batches, dimensions, seed)) is None


def test_one_or_two_odd_batches_are_no_group():
    """A small last batch is far from the others, and the silhouette of the two clusters is near 1."""
    for odd in (1, 2):
        rows = 0.1 * noise_alone(20, 6, 0)
        rows[:odd] += 50
        labels = (np.arange(20) < odd).astype(int)
        assert silhouette(rows, labels) > 0.9
        assert counted(rows) is None


def test_a_drift_has_no_groups():
    rows = np.linspace(0, 10, 30)[:, None] + 0.1 * noise_alone(30, 5, 0)
    assert counted(rows) is None


def test_few_batches_have_no_groups():
    rows, _ = blobs(2, batches=9, noise=0.01)
    assert counted(rows) is None
    assert counted(blobs(2, batches=10, noise=0.01)[0]) == 2
    assert number_of_groups([None]) is None
    assert number_of_groups([]) is None


def test_more_groups_than_are_tried_are_not_counted():
    """Twenty classes would be called twelve groups."""
    rows, _ = blobs(20, batches=120, noise=0.01)
    assert counted(rows) is None
    assert counted(blobs(10, batches=60, noise=0.01)[0]) == 10


def test_columns_that_are_not_finite_are_left_out():
    rows, _ = blobs(3)
    rows[4, 2], rows[5, 3] = np.nan, np.inf
    assert counted(rows) == 3
    assert counted(np.full((20, 2), np.nan)) is None
    assert counted(np.zeros((20, 2))) is None


def test_the_layer_where_the_groups_are_the_most_distinct_decides():
    """Behind a BN layer two of five domains look alike."""
    rows, labels = blobs(5, batches=30, noise=0.05)
    merged = np.where((labels == 4)[:, None], rows[labels == 3].mean(0), rows) + 0.1 * noise_alone(30, 8, 0)
    assert counted(merged) == 4
    assert number_of_groups([merged, None, rows]) == 5
    assert number_of_groups([merged, merged, merged, merged, rows]) == 4


def test_a_number_that_another_one_fits_as_well_is_not_stated():
    """Three groups, of which two are near. Two clusters have the larger silhouette, and would be a wrong answer."""
    labels = np.arange(60) % 3
    noise = noise_alone(60, 1, 0)
    rows = np.array([[-10.0], [1.0], [5.0]])[labels] + noise
    fits = {k: silhouette_score(rows, KMeans(k, n_init=10, random_state=0).fit_predict(rows)) for k in (2, 3)}
    assert 0.7 < fits[3] < fits[2] < fits[3] + 0.075
    assert counted(rows) is None
    assert counted(np.array([[-10.0], [0.0], [10.0]])[labels] + noise) == 3
