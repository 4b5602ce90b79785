"""One column of the network: a layer, its gap stacked by cause or the range of its variance, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bnlab.records import Level, Range
from bnlab.report.html import causes as _causes
from bnlab.report.html.escaping import layer_name, number
from bnlab.report.html.groups import Span
from bnlab.report.html.markers import Marked
from bnlab.report.html.scale import Linear, Log
from bnlab.report.rows import root_gap

__all__ = ["FOOT", "LEFT", "PLOT", "TOP", "Bar", "Column", "Pen", "Shown", "up"]

LEFT = 52.0
"""Where the first column begins, in pixels."""

TOP, PLOT = 34.0, 210.0
"""Where the axis ends, and how long it is."""

FOOT = TOP + PLOT
"""Where the axis begins."""

_WIDEST_BAR = 34.0


@dataclass(frozen=True)
class Shown:
    """A layer as far as the drawing needs it.

    Attributes:
        name: Layer path.
        gaps: Its gap by cause: one, or before and after a repair; None where it was not measured.
        span: Range of its running_var, drawn where no layer has a gap.
        marked: What the checks found in it.
    """

    name: str
    gaps: tuple[Mapping[str, float] | None, ...] = (None,)
    span: Range | None = None
    marked: Marked = field(default_factory=Marked)

    @property
    def largest(self) -> float:
        """The largest of its gaps in std; what is not finite is the largest of all."""
        found = [root_gap(gap) if _causes.is_finite(gap) else float("inf") for gap in self.gaps if gap is not None]
        return max(found, default=-1.0)


@dataclass(frozen=True)
class Bar:
    """A rectangle; without a colour it stands for what has no size."""

    x: float
    y: float
    width: float
    height: float
    colour: str | None


@dataclass(frozen=True)
class Column:
    """What stands for one span of layers.

    Attributes:
        index: Of the layer that is shown.
        first: Index of the first layer.
        last: Index of the last layer.
        x: Left edge of the place it has.
        middle: Its middle.
        width: How wide that place is.
        bars: What is drawn.
        median: Where the median of a range is; None where no range is drawn.
        level: Of the worst finding; None without one.
        title: What is said of it, line by line.
    """

    index: int
    first: int
    last: int
    x: float
    middle: float
    width: float
    bars: tuple[Bar, ...]
    median: float | None
    level: Level | None
    title: str


def up(fraction: float) -> float:
    """Return where a fraction of the axis lies on the drawing."""
    return round(FOOT - PLOT * fraction, 1)


@dataclass(frozen=True)
class Pen:
    """Draws columns of one width on one axis.

    Attributes:
        pitch: From one column to the next, in pixels.
        axis: Linear for the gap, logarithmic for the running variance.
        pairs: How many gaps stand in a column.
        count: How many layers the network has.
    """

    pitch: float
    axis: Linear | Log
    pairs: int
    count: int

    def column(self, place: int, span: Span, layers: Sequence[Shown]) -> Column:
        """Return the column of a span: its worst layer, under the findings of all of them."""
        layer = layers[span.shown]
        marked = Marked(
            tuple(finding for other in layers[span.first : span.last + 1] for finding in other.marked.findings)
        )
        x = LEFT + place * self.pitch
        bars = self._stacks(x, layer) if isinstance(self.axis, Linear) else self._range(x, layer.span)
        has_range = isinstance(self.axis, Log)
        return Column(
            index=span.shown,
            first=span.first,
            last=span.last,
            x=round(x, 1),
            middle=round(x + self.pitch / 2, 1),
            width=round(self.pitch, 1),
            bars=tuple(bars),
            median=up(self.axis.at(layer.span.median)) if has_range and layer.span is not None else None,
            level=marked.level,
            title=_title(layer, span, self.count, marked),
        )

    def _stacks(self, x: float, layer: Shown) -> list[Bar]:
        """Return the gaps of a layer side by side, each stacked by cause."""
        width = min(self.pitch * 0.76, _WIDEST_BAR * self.pairs) / self.pairs
        left = x + (self.pitch - width * self.pairs) / 2
        found: list[Bar] = []
        for place, gap in enumerate(layer.gaps):
            if gap is not None:
                found += self._stack(left + place * width, width - (1 if self.pairs > 1 else 0), gap)
        return found

    def _stack(self, x: float, width: float, gap: Mapping[str, float]) -> list[Bar]:
        if not _causes.is_finite(gap):
            return [_bar(x, TOP, width, PLOT, None)]
        whole = self.axis.at(root_gap(gap)) * PLOT
        found, foot = [], FOOT
        for part in _causes.parts(gap):
            height = whole * part.fraction
            foot -= height
            if height >= 0.05:
                found.append(_bar(x, foot, width, height, part.colour))
        return found

    def _range(self, x: float, span: Range | None) -> list[Bar]:
        if span is None:
            return []
        width = min(self.pitch * 0.5, _WIDEST_BAR / 2)
        top, foot = up(self.axis.at(span.max)), up(self.axis.at(span.min))
        return [_bar(x + (self.pitch - width) / 2, top, width, max(foot - top, 1.5), _causes.COLOURS["shift"])]


def _bar(x: float, y: float, width: float, height: float, colour: str | None) -> Bar:
    return Bar(round(x, 1), round(y, 1), round(width, 1), round(height, 2), colour)


def _title(layer: Shown, span: Span, count: int, marked: Marked) -> str:
    """Return what is said of a column, line by line."""
    place = f"layer {span.shown + 1:,} of {count:,}"
    if span.first != span.last:
        place += f", the worst of {span.first + 1:,} to {span.last + 1:,}"
    lines = [layer_name(layer.name), place]
    words = ("gap",) if len(layer.gaps) == 1 else ("gap before", "gap after")
    lines += [_gap_line(word, gap) for word, gap in zip(words, layer.gaps, strict=True) if gap is not None]
    if layer.span is not None:
        lines.append(f"running_var {number(layer.span.min)} .. {number(layer.span.max)}")
    if marked.findings:
        lines.append(marked.codes_with_levels)
    return "\n".join(lines)


def _gap_line(word: str, gap: Mapping[str, float]) -> str:
    told = ", ".join(f"{cause} {100 * share:.0f} %" for cause, share in _causes.shares(gap) if abs(share) >= 0.005)
    return f"{word} {number(root_gap(gap))} std" + (f": {told}" if told else "")
