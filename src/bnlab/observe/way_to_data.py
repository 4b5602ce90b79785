"""Recognises running statistics that are those of the evaluation data instead of those of the training data."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bnlab.observe.differences import differences
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelLayer, Observed

__all__ = ["way_to_data"]

_MIN_WAY = 0.5
"""Share of the way that the statistics have gone at least, less `_ERRORS` standard errors."""

_MAX_WAY = 1.5
"""Share of the way beyond which the statistics are not those of `data`, but further in their direction."""

_ERRORS = 4.0

_MIN_R_SQUARED = 0.9
"""Share of the change that the way to the evaluation data explains at least."""

_MIN_SHIFT = 0.03
"""Root mean square shift between the data sets, in standard deviations, below which they are too alike."""


def way_to_data(layers: Iterable[ModelLayer]) -> float | None:
    """Return how far the running statistics have gone from those of the training data to those of `data`.

    The differences of means, in standard deviations, and half the log ratios of variances are regressed over all
    channels of the layers: buffers minus training data, on data minus training data. 1 stands for buffers that hold the
    statistics of `data`.

    Args:
        layers: The layers whose statistics are stale.

    Returns:
        The share of the way; None where the data sets are too alike, or where the change has another direction.
    """
    ways, shifts = [], []
    for layer in layers:
        if layer.state is None or layer.data is None or layer.train_data is None:
            continue
        ways.append(_from_training(layer.state.running_mean, layer.state.running_var, layer.train_data, layer.eps))
        shifts.append(_from_training(layer.data.within_mean, layer.data.within_var, layer.train_data, layer.eps))
    if not ways:
        return None
    way, shift = np.concatenate(ways), np.concatenate(shifts)
    finite = np.isfinite(way) & np.isfinite(shift)
    way, shift = way[finite], shift[finite]
    if len(way) < 3 or np.sqrt(np.mean(shift**2)) <= _MIN_SHIFT or not np.any(way):
        return None
    weight = float(way @ shift / (shift @ shift))
    rest = float(np.sum((way - weight * shift) ** 2))
    error = np.sqrt(rest / (len(way) - 1) / (shift @ shift))
    explains = 1 - rest / float(way @ way) > _MIN_R_SQUARED
    is_between = weight - _ERRORS * error > _MIN_WAY and weight < _MAX_WAY
    return weight if explains and is_between else None


def _from_training(mean: Floats, var: Floats, reference: Observed, eps: float) -> Floats:
    return np.concatenate(differences(mean, var, reference.within_mean, reference.within_var, eps))
