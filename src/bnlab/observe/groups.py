"""Counts the groups into which the batches of a data set fall, by their statistics at one layer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.evidence import Floats

__all__ = ["clusters", "number_of_groups", "silhouette"]

Labels = NDArray[np.intp]

_MIN_SILHOUETTE = 0.7
"""Silhouette above which groups count as certain; Kaufman and Rousseeuw call a structure above it strong."""

_MIN_LEAD = 0.15
"""Lead over the silhouette of every other number of groups, times the number of groups: to split or to join one of k
distinct groups changes a share 1/k. Where two of three groups are near, two fit almost as well."""

_MAX_LAYERS = 4
"""Number of layers in which groups are counted."""

_MIN_BATCHES = 10
"""Number of batches below which chance alone forms groups."""

_MIN_IN_GROUP = 3
"""Number of batches in the smallest group. One or two batches that differ are no group."""

_MAX_GROUPS = 12
"""Number of groups that are tried. If that many fit best, more may fit better, and the number is not known."""

_STARTS = 6
"""Number of starts of each kind."""

_ROUNDS = 60
"""Number of rounds of k-means after which it counts as settled."""


def number_of_groups(layers: Iterable[Floats | None]) -> int | None:
    """Return the number of groups into which batches fall; None where they do not form distinct groups.

    The number of clusters with the largest silhouette counts, if that silhouette is above 0.7 and no other number fits
    almost as well. The batches of shuffled data, and those of data that drift, do not reach it. Behind a BN layer some
    groups look alike, so the layer where they are the most distinct decides.

    Args:
        layers: The statistics of the batches at several layers, one row per batch, shape (B, D); None for a layer where
            they were not recorded. The first four layers are used.

    Source:
        Rousseeuw 1987, Silhouettes; Kaufman and Rousseeuw 1990, Finding Groups in Data, on the limit of 0.7.
    """
    tried = [
        _separations(rows[:, np.isfinite(rows).all(0)]) for rows in islice(layers, _MAX_LAYERS) if rows is not None
    ]
    separations = max(tried, key=lambda each: max(each.values(), default=0.0), default={})
    if not separations:
        return None
    count = max(separations, key=separations.__getitem__)
    lead = separations[count] - max((value for k, value in separations.items() if k != count), default=0.0)
    is_certain = separations[count] > _MIN_SILHOUETTE and lead > _MIN_LEAD / count and count < _MAX_GROUPS
    return count if is_certain else None


def clusters(rows: Floats, count: int) -> Labels:
    """Return the cluster of each row by k-means: the best of several starts, which are the same in every run.

    Half of the starts are a row and then, again and again, the row that is farthest from all rows chosen before. They
    show distinct groups, but begin at outliers. The other starts are random rows.

    Args:
        rows: Shape (B, D).
        count: Number of clusters, at most B. Fewer are used if there are not as many distinct rows.

    Returns:
        Numbers from 0 to `count` - 1, shape (B,).

    Source:
        Lloyd 1982, Least squares quantization in PCM; Gonzalez 1985, for the start.
    """
    centred = rows - rows.mean(0)
    from_mean = np.einsum("bd,bd->b", centred, centred)
    firsts = [from_mean.argmax(), from_mean.argmin(), *np.linspace(0, len(rows) - 1, _STARTS - 2).round()]
    starts = [_farthest_apart(centred, int(first), count) for first in firsts]
    generator = np.random.default_rng(0)
    starts += [centred[generator.choice(len(rows), count, replace=False)] for _ in range(_STARTS)]
    best, least = np.zeros(len(rows), dtype=np.intp), np.inf
    for start in starts:
        labels, square = _settled(centred, start)
        if square < least:
            best, least = labels, square
    return best


def silhouette(rows: Floats, labels: Labels) -> float:
    """Return the mean silhouette of a clustering, in [-1, 1]; 0 for a single cluster.

    The silhouette of a row is (b - a)/max(a, b), where a is the mean distance from the other rows of its cluster and b
    that from the rows of the nearest other cluster. It is 0 for a row that is alone in its cluster.

    Args:
        rows: Shape (B, D).
        labels: The cluster of each row, shape (B,).

    Source:
        Rousseeuw 1987, Silhouettes: a graphical aid to the interpretation and validation of cluster analysis.
    """
    numbers, places = np.unique(labels, return_inverse=True)
    if len(numbers) < 2:
        return 0.0
    centred = rows - rows.mean(0)
    distances = np.sqrt(_squared_distances(centred, centred))
    np.fill_diagonal(distances, 0.0)
    members = np.eye(len(numbers))[places]
    sizes = members.sum(0)
    sums = distances @ members
    own = sums[np.arange(len(rows)), places] / np.maximum(sizes[places] - 1, 1)
    nearest = np.where(members == 1, np.inf, sums / sizes).min(1)
    scale = np.maximum(own, nearest)
    values = np.divide(nearest - own, scale, out=np.zeros(len(rows)), where=scale > 0)
    return float(np.where(sizes[places] > 1, values, 0.0).mean())


def _separations(rows: Floats) -> dict[int, float]:
    """Return the silhouette of the clustering into each number of groups that are large enough."""
    if len(rows) < _MIN_BATCHES or not rows.size:
        return {}
    clusterings = {k: clusters(rows, k) for k in range(2, min(_MAX_GROUPS, len(rows) // _MIN_IN_GROUP) + 1)}
    return {
        k: silhouette(rows, labels)
        for k, labels in clusterings.items()
        if np.bincount(labels, minlength=k).min() >= _MIN_IN_GROUP
    }


def _farthest_apart(rows: Floats, first: int, count: int) -> Floats:
    """Return `count` rows, each as far as possible from those before it."""
    chosen = [first]
    distances = _squared_distances(rows, rows[[first]])[:, 0]
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, _squared_distances(rows, rows[[chosen[-1]]])[:, 0])
    return rows[chosen]


def _settled(rows: Floats, centers: Floats) -> tuple[Labels, float]:
    """Move the centers until no row changes its cluster; return the clusters and the sum of the squared distances."""
    labels = np.full(len(rows), -1, dtype=np.intp)
    for _ in range(_ROUNDS):
        distances = _squared_distances(rows, centers)
        nearest = distances.argmin(1)
        if (nearest == labels).all():
            break
        labels = nearest
        members = np.eye(len(centers))[labels]
        sizes = members.sum(0)
        means = members.T @ rows / np.maximum(sizes, 1)[:, None]
        centers = np.where(sizes[:, None] > 0, means, centers)
    return labels, float(_squared_distances(rows, centers)[np.arange(len(rows)), labels].sum())


def _squared_distances(left: Floats, right: Floats) -> Floats:
    """Return the squared Euclidean distances between two sets of rows, of shape (len(left), len(right))."""
    squares = np.einsum("bd,bd->b", left, left)[:, None] + np.einsum("bd,bd->b", right, right)
    return np.asarray(np.maximum(squares - 2 * left @ right.T, 0.0))
