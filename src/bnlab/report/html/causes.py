"""Prepares the causes of the gap for drawing: their colours, and their parts of a gap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import Cause
from bnlab.report.rows import root_gap

__all__ = ["COLOURS", "Part", "Slice", "colour", "is_finite", "ordered", "parts", "shares", "slices", "visible"]

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
"""The colour of each cause, in stacking order. The palette of Okabe and Ito is safe for colour-blind readers. Staleness
has one colour, with or without training data."""

_OTHER = "#8C8C8C"
_TOTAL = "total"
_SMALLEST = 0.01
_LIGHT_ON = ("#0072B2",)
_LETTER, _PADDING = 1.45, 4.0
"""Width of a letter, and of the padding, in % of a bar that is 600 pixels wide."""


@dataclass(frozen=True)
class Part:
    """A cause of a gap and its fraction of the drawn stack, in [0, 1]."""

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
        start: Left edge, in % of the bar.
        width: Width, in % of the bar.
        percent: The share as text, written on the slice if the slice is wide enough.
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
        """Whether the slice has room for its name and share."""
        return self.width >= _LETTER * len(f"{self.cause} {self.percent}") + _PADDING

    @property
    def ink(self) -> str:
        """The colour of the text on the slice."""
        return "#fff" if self.colour in _LIGHT_ON else "#000"


def colour(cause: str) -> str:
    """Return the colour of a cause."""
    return COLOURS.get(cause, _OTHER)


def is_finite(gap: Mapping[str, float]) -> bool:
    """Whether a gap has a size that can be drawn."""
    return math.isfinite(root_gap(gap))


def ordered(causes: Iterable[str]) -> list[str]:
    """Return the distinct causes in stacking order; unknown causes come last."""
    distinct = dict.fromkeys(causes)
    return [cause for cause in COLOURS if cause in distinct] + [cause for cause in distinct if cause not in COLOURS]


def parts(gap: Mapping[str, float]) -> list[Part]:
    """Return the parts that are stacked for a gap: its positive causes, in proportion."""
    positive = {cause: gap[cause] for cause in ordered(gap) if cause != _TOTAL and 0 < gap[cause] < math.inf}
    whole = sum(positive.values())
    return [Part(cause, square / whole) for cause, square in positive.items() if square / whole > 0]


def shares(gap: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return each cause with its share of the total, largest first; shares may be negative."""
    total = gap.get(_TOTAL, 0.0)
    if not 0 < total < math.inf:
        return []
    shares_by_cause = [
        (cause, square / total) for cause, square in gap.items() if cause != _TOTAL and math.isfinite(square)
    ]
    return sorted(shares_by_cause, key=lambda item: -abs(item[1]))


def visible(gaps: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the causes that are visible in at least one stack when all stacks share one scale, for the legend."""
    largest = max((root_gap(gap) for gap in gaps if is_finite(gap)), default=0.0)
    return ordered(
        part.cause
        for gap in gaps
        if is_finite(gap)
        for part in parts(gap)
        if part.fraction * root_gap(gap) >= _SMALLEST * largest
    )


def slices(causes: Sequence[Cause]) -> list[Slice]:
    """Return the slices of the bar: the positive shares side by side, in proportion."""
    positive = {cause.cause: cause.share for cause in causes if 0 < cause.share < math.inf}
    whole = sum(positive.values())
    slices_of_bar, start = [], 0.0
    for cause in ordered(positive):
        width = positive[cause] / whole
        slices_of_bar.append(
            Slice(cause, round(100 * start, 2), round(100 * width, 2), f"{100 * positive[cause]:.0f} %")
        )
        start += width
    return slices_of_bar
