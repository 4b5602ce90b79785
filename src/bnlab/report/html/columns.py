"""Draws one column of the network: the gap of a layer stacked by cause, or its range of running_var."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bnlab.records import Level, Range
from bnlab.report.html import causes as _causes
from bnlab.report.html.escaping import layer_name, number
from bnlab.report.html.groups import Span
from bnlab.report.html.markers import LayerFindings
from bnlab.report.html.scale import Linear, Log
from bnlab.report.rows import root_gap

__all__ = ["FOOT", "LEFT", "PLOT", "TOP", "Bar", "Column", "ColumnBuilder", "DrawnLayer", "y_of"]

LEFT = 52.0
"""Left edge of the first column, in pixels."""

TOP, PLOT = 34.0, 210.0
"""Upper end of the vertical axis, and its length, in pixels."""

FOOT = TOP + PLOT
"""Lower end of the vertical axis, in pixels."""

_WIDEST_BAR = 34.0


@dataclass(frozen=True)
class DrawnLayer:
    """The data of a layer that the drawing needs.

    Attributes:
        name: Layer path.
        gaps: The gap by cause: one, or two for before and after a repair; None if it was not measured.
        span: Range of running_var, drawn if no layer has a gap.
        marked: The findings in the layer.
    """

    name: str
    gaps: tuple[Mapping[str, float] | None, ...] = (None,)
    span: Range | None = None
    marked: LayerFindings = field(default_factory=LayerFindings)

    @property
    def largest(self) -> float:
        """The largest of the gaps in std; inf if one is not finite, -1 if none was measured."""
        gaps = [root_gap(gap) if _causes.is_finite(gap) else float("inf") for gap in self.gaps if gap is not None]
        return max(gaps, default=-1.0)


@dataclass(frozen=True)
class Bar:
    """A rectangle; without a colour it stands for a gap that is not finite."""

    x: float
    y: float
    width: float
    height: float
    colour: str | None


@dataclass(frozen=True)
class Column:
    """The drawing of one span of layers.

    Attributes:
        index: Index of the layer that is shown.
        first: Index of the first layer.
        last: Index of the last layer.
        x: Left edge of the column.
        middle: Horizontal middle of the column.
        width: Width of the column.
        bars: The rectangles to draw.
        median: Height of the median of a range; None if no range is drawn.
        level: Level of the worst finding; None without a finding.
        title: Text of the tooltip, line by line.
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


def y_of(fraction: float) -> float:
    """Return the y coordinate of a fraction of the vertical axis."""
    return round(FOOT - PLOT * fraction, 1)


@dataclass(frozen=True)
class ColumnBuilder:
    """Draws columns of one width on one axis.

    Attributes:
        pitch: Distance from one column to the next, in pixels.
        axis: Linear axis for the gap, logarithmic axis for the running variance.
        pairs: Number of gaps in a column.
        count: Number of layers of the network.
    """

    pitch: float
    axis: Linear | Log
    pairs: int
    count: int

    def column(self, place: int, span: Span, layers: Sequence[DrawnLayer]) -> Column:
        """Return the column of a span: its worst layer, with the findings of all its layers."""
        layer = layers[span.shown]
        marked = LayerFindings(
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
            median=y_of(self.axis.at(layer.span.median)) if has_range and layer.span is not None else None,
            level=marked.level,
            title=_title(layer, span, self.count, marked),
        )

    def _stacks(self, x: float, layer: DrawnLayer) -> list[Bar]:
        """Return the gaps of a layer side by side, each stacked by cause."""
        width = min(self.pitch * 0.76, _WIDEST_BAR * self.pairs) / self.pairs
        left = x + (self.pitch - width * self.pairs) / 2
        bars: list[Bar] = []
        for place, gap in enumerate(layer.gaps):
            if gap is not None:
                bars += self._stack(left + place * width, width - (1 if self.pairs > 1 else 0), gap)
        return bars

    def _stack(self, x: float, width: float, gap: Mapping[str, float]) -> list[Bar]:
        if not _causes.is_finite(gap):
            return [_bar(x, TOP, width, PLOT, None)]
        whole = self.axis.at(root_gap(gap)) * PLOT
        bars, foot = [], FOOT
        for part in _causes.parts(gap):
            height = whole * part.fraction
            foot -= height
            if height >= 0.05:
                bars.append(_bar(x, foot, width, height, part.colour))
        return bars

    def _range(self, x: float, span: Range | None) -> list[Bar]:
        if span is None:
            return []
        width = min(self.pitch * 0.5, _WIDEST_BAR / 2)
        top, foot = y_of(self.axis.at(span.max)), y_of(self.axis.at(span.min))
        return [_bar(x + (self.pitch - width) / 2, top, width, max(foot - top, 1.5), _causes.COLOURS["shift"])]


def _bar(x: float, y: float, width: float, height: float, colour: str | None) -> Bar:
    return Bar(round(x, 1), round(y, 1), round(width, 1), round(height, 2), colour)


def _title(layer: DrawnLayer, span: Span, count: int, marked: LayerFindings) -> str:
    """Return the tooltip of a column, line by line."""
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
    shares = ", ".join(f"{cause} {100 * share:.0f} %" for cause, share in _causes.shares(gap) if abs(share) >= 0.005)
    return f"{word} {number(root_gap(gap))} std" + (f": {shares}" if shares else "")
