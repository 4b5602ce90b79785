"""Keeps the statistics of single batches at a layer, in bounded memory, to show whether the batches form groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.evidence import Floats

__all__ = ["BatchRows", "spread_channels"]

_MAX_BATCHES = 256
_MAX_CHANNELS = 32

_SMALLEST_SCALE = 1e-150
"""Smallest variance, squared input units, that replaces 0 where eps is 0; its square root and its log are finite."""


def spread_channels(channels: int) -> NDArray[np.intp]:
    """Return up to 32 of a number of channels, spread evenly over them."""
    return np.unique(np.linspace(0, channels - 1, min(channels, _MAX_CHANNELS)).round().astype(np.intp))


class BatchRows:
    """The statistics of at most 256 batches in at most 32 channels, spread evenly over the layer.

    Beyond 256 batches a random sample is kept. Every second one would be a wrong sample: of two groups in turn it would
    show one.
    """

    def __init__(self, channels: int) -> None:
        self._chosen = spread_channels(channels)
        self._rows: list[tuple[Floats, Floats]] = []
        self._batches = 0
        self._generator = np.random.default_rng(0)

    def add(self, mean: Floats, var: Floats) -> None:
        """Add the mean and the variance of a batch, both of shape (C,)."""
        self._batches += 1
        row = mean[self._chosen], var[self._chosen]
        if len(self._rows) < _MAX_BATCHES:
            self._rows.append(row)
            return
        place = int(self._generator.integers(self._batches))
        if place < _MAX_BATCHES:
            self._rows[place] = row

    def standardised(self, mean: Floats, var: Floats, eps: float) -> Floats:
        """Return a row per batch: its means in standard deviations, then half the logs of its variances.

        Args:
            mean: The mean of each channel that becomes 0, shape (C,), input units.
            var: The variance of each channel that becomes 1, shape (C,), squared input units.
            eps: Number that is added to the variances.

        Returns:
            Shape (batches, 2 * channels), unitless.
        """
        means, variances = (np.array(column) for column in zip(*self._rows, strict=True))
        center, scale = mean[self._chosen], np.maximum(var[self._chosen] + eps, _SMALLEST_SCALE)
        with np.errstate(over="ignore", invalid="ignore"):
            of_means = (means - center) / np.sqrt(scale)
            of_variances = np.log(np.maximum(variances + eps, _SMALLEST_SCALE) / scale) / 2
        return np.concatenate([of_means, of_variances], 1)
