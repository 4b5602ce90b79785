"""The causes of the gap as they are drawn: the colour of each, and what part of a gap it has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import Cause
from bnlab.report.rows import root_gap

__all__ = ["COLOURS", "Part", "Slice", "colour", "drawn", "is_finite", "ordered", "parts", "shares", "slices"]

COLOURS: Mapping[str, str] = {
    "staleness": "#D55E00",
    "staleness or shift": "#D55E00",
    "shift": "#0072B2",
    "heterogeneity": "#E69F00",
    "training heterogeneity": "#F0E442",
    "dropout": "#CC79A7",
    "precision": "#8C8C8C",
    "sampling noise": "#56B4E9",
    "bessel": "#009E73",
}
"""Okabe and Ito's palette, which nobody confuses; staleness is one cause with or without training data. In the order
in which they are stacked."""

_OTHER = "#8C8C8C"
_TOTAL = "total"
_SMALLEST = 0.01
_LIGHT_ON = ("#0072B2",)
_LETTER, _PADDING = 1.45, 4.0
"""In % of a bar that is 600 pixels wide."""


@dataclass(frozen=True)
class Part:
    """A cause of a gap with the part it has of what is drawn, in [0, 1]."""

    cause: str
    fraction: float

    @property
    def colour(self) -> str:
        """The colour of the cause."""
        return colour(self.cause)


@dataclass(frozen=True)
class Slice:
    """A cause on a bar.

    Attributes:
        cause: The cause.
        start: Where it begins, in % of the bar.
        width: How wide it is, in % of the bar.
        percent: Its share, as it is written into the bar where that is wide enough.
    """

    cause: str
    start: float
    width: float
    percent: str

    @property
    def colour(self) -> str:
        """The colour of the cause."""
        return colour(self.cause)

    @property
    def is_labelled(self) -> bool:
        """Whether there is room for its name and share."""
        return self.width >= _LETTER * len(f"{self.cause} {self.percent}") + _PADDING

    @property
    def ink(self) -> str:
        """The colour of what is written into it."""
        return "#fff" if self.colour in _LIGHT_ON else "#000"


def colour(cause: str) -> str:
    """Return the colour of a cause."""
    return COLOURS.get(cause, _OTHER)


def is_finite(gap: Mapping[str, float]) -> bool:
    """Whether a gap has a size that can be drawn."""
    return math.isfinite(root_gap(gap))


def ordered(causes: Iterable[str]) -> list[str]:
    """Return causes as they are stacked, each once; those that are not known come last."""
    found = dict.fromkeys(causes)
    return [cause for cause in COLOURS if cause in found] + [cause for cause in found if cause not in COLOURS]


def parts(gap: Mapping[str, float]) -> list[Part]:
    """Return what a gap is stacked of: the positive causes, in proportion."""
    positive = {cause: gap[cause] for cause in ordered(gap) if cause != _TOTAL and 0 < gap[cause] < math.inf}
    whole = sum(positive.values())
    return [Part(cause, square / whole) for cause, square in positive.items() if square / whole > 0]


def shares(gap: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return each cause with its share of the total, largest first, negative ones included."""
    total = gap.get(_TOTAL, 0.0)
    if not 0 < total < math.inf:
        return []
    found = [(cause, square / total) for cause, square in gap.items() if cause != _TOTAL and math.isfinite(square)]
    return sorted(found, key=lambda item: -abs(item[1]))


def drawn(gaps: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the causes that can be seen in some stack when all are drawn on one scale, for a legend."""
    largest = max((root_gap(gap) for gap in gaps if is_finite(gap)), default=0.0)
    return ordered(
        part.cause
        for gap in gaps
        if is_finite(gap)
        for part in parts(gap)
        if part.fraction * root_gap(gap) >= _SMALLEST * largest
    )


def slices(causes: Sequence[Cause]) -> list[Slice]:
    """Return the positive shares side by side, in proportion."""
    positive = {cause.cause: cause.share for cause in causes if 0 < cause.share < math.inf}
    whole = sum(positive.values())
    found, start = [], 0.0
    for cause in ordered(positive):
        width = positive[cause] / whole
        found.append(Slice(cause, round(100 * start, 2), round(100 * width, 2), f"{100 * positive[cause]:.0f} %"))
        start += width
    return found
