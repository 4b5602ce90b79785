"""Places the estimates of a claim on a common scale, with the values that agree with the claim as a band."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnlab.records import ClaimRecord, Estimate
from bnlab.report.html.scale import WIDE

__all__ = ["WIDTH", "Plot", "Row", "plot"]

WIDTH = 240.0
_MARGIN = 6.0
_LEFT, _RIGHT = _MARGIN, WIDTH - _MARGIN
_NARROWEST_BAND = 1.0


@dataclass(frozen=True)
class Row:
    """The positions of one estimate.

    Attributes:
        estimate: The estimate.
        at: Position of the mean; None if the mean is NaN.
        start: Position of the lower end of the interval.
        end: Position of the upper end of the interval.
    """

    estimate: Estimate
    at: float | None
    start: float
    end: float


@dataclass(frozen=True)
class Plot:
    """The positions of the estimates of one claim.

    Attributes:
        rows: The positions of each estimate.
        band: Left edge and width of the band of values that agree with the claim.
        first: The number at the left end.
        last: The number at the right end.
        log: Whether the scale is logarithmic.
    """

    rows: tuple[Row, ...]
    band: tuple[float, float]
    first: float
    last: float
    log: bool


@dataclass(frozen=True)
class _Scale:
    first: float
    last: float
    log: bool

    def at(self, value: float) -> float:
        """Return the position of a value; a value beyond an end is placed at that end."""
        if not value > self.first:
            return _LEFT
        if value >= self.last:
            return _RIGHT
        first, value, last = map(math.log10 if self.log else _half, (self.first, value, self.last))
        return round(_LEFT + (value - first) / (last - first) * (_RIGHT - _LEFT), 1)


def plot(claim: ClaimRecord) -> Plot | None:
    """Return the positions of the estimates; None if there are fewer than two."""
    if len(claim.estimates) < 2:
        return None
    scale = _scale(claim)
    start = 0.0 if claim.low < scale.first else scale.at(claim.low)
    end = WIDTH if claim.high > scale.last else scale.at(claim.high)
    rows = tuple(
        Row(
            estimate,
            at=None if math.isnan(estimate.mean) else scale.at(estimate.mean),
            start=scale.at(estimate.low),
            end=scale.at(estimate.high),
        )
        for estimate in claim.estimates
    )
    band = (start, max(round(end - start, 1), _NARROWEST_BAND))
    return Plot(rows, band, scale.first, scale.last, scale.log)


def _scale(claim: ClaimRecord) -> _Scale:
    """Return a scale for means, intervals and limits; logarithmic if they span a wide range and none is negative."""
    means = [estimate.mean for estimate in claim.estimates]
    upper = _finite([*means, *(estimate.high for estimate in claim.estimates), claim.low, claim.high])
    positive = [value for value in upper if value > 0]
    if positive and min(_finite(means), default=-1.0) >= 0 and max(positive) / WIDE > min(positive):
        return _Scale(min(positive), max(positive), log=True)
    every = [*upper, *_finite(estimate.low for estimate in claim.estimates)] or [0.0]
    return _Scale(min(every), max(every), log=False)


def _finite(values: Iterable[float] | Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _half(value: float) -> float:
    """Return half of a value, because the difference of two halves cannot overflow."""
    return value / 2
