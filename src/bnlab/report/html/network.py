"""Draws the network from input to output: a column for each layer, or for a few consecutive layers of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnlab.report.html import causes as _causes
from bnlab.report.html.columns import FOOT, LEFT, TOP, Column, ColumnBuilder, DrawnLayer, y_of
from bnlab.report.html.groups import blocks, leaves, spans
from bnlab.report.html.scale import Linear, Log

__all__ = ["Label", "Line", "Network", "draw"]

_MAX_COLUMNS = 150
_WIDTH = 1088.0
_NARROWEST = 360.0
_RIGHT = 8.0
_LEAF, _BRACKET, _BLOCK = FOOT + 16, FOOT + 24, FOOT + 38
_HEIGHT = FOOT + 46
_WIDEST_PITCH = 96.0
_LETTER = 6.4
_ROOM_FOR_LETTER = 15.0


@dataclass(frozen=True)
class Line:
    """A grid line of the axis, with its label."""

    y: float
    label: str


@dataclass(frozen=True)
class Label:
    """Text under the columns from `start` to `end`; "" if there is no room for text."""

    text: str
    start: float
    end: float

    @property
    def middle(self) -> float:
        """Horizontal middle of the text."""
        return round((self.start + self.end) / 2, 1)


@dataclass(frozen=True)
class Network:
    """The drawing of a network; positions and sizes are in pixels.

    Attributes:
        width: Width of the drawing.
        columns: The columns, from input to output.
        lines: The grid lines of the axis.
        leaves: Names of the layers; empty if there is no room for them.
        blocks: Names of the parts of the network.
        axis: The quantity on the axis, and its unit.
        causes: The visible causes, in stacking order.
        merged: Largest number of layers in one column.
        has_letters: Whether markers have room for a letter.
        has_pairs: Whether columns show the gap before and after a repair.
    """

    width: float
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    leaves: tuple[Label, ...]
    blocks: tuple[Label, ...]
    axis: str
    causes: tuple[str, ...]
    merged: int
    has_letters: bool
    has_pairs: bool
    height: float
    left: float = LEFT
    top: float = TOP
    foot: float = FOOT
    leaf: float = _LEAF
    bracket: float = _BRACKET
    block: float = _BLOCK

    @property
    def has_gaps(self) -> bool:
        """Whether the drawing shows the gap rather than the running variance."""
        return self.axis.startswith("gap")


def draw(layers: Sequence[DrawnLayer], *, width: float = _WIDTH) -> Network | None:
    """Return the drawing; None if there are no layers, or nothing to draw for any layer."""
    has_gaps = any(gap is not None for layer in layers for gap in layer.gaps)
    if not has_gaps and all(layer.span is None for layer in layers):
        return None
    pairs = max(len(layer.gaps) for layer in layers)
    columns = spans(len(layers), _MAX_COLUMNS // pairs, lambda index: _badness(layers[index], has_gaps=has_gaps))
    pitch = min((width - LEFT - _RIGHT) / len(columns), _WIDEST_PITCH)
    builder = ColumnBuilder(pitch, _gap_axis(layers) if has_gaps else _var_axis(layers), pairs, len(layers))
    merged = columns[0].last - columns[0].first + 1
    names = [layer.name for layer in layers]
    under = _blocks(names, pitch / merged)
    return Network(
        width=round(max(LEFT + pitch * len(columns) + _RIGHT, _NARROWEST), 1),
        columns=tuple(builder.column(place, span, layers) for place, span in enumerate(columns)),
        lines=tuple(Line(y_of(tick.at), tick.label) for tick in builder.axis.ticks()),
        leaves=tuple(_leaves(names, pitch)) if merged == 1 else (),
        blocks=tuple(under),
        axis="gap between the modes, std" if has_gaps else "running_var, input\N{SUPERSCRIPT TWO}",
        causes=tuple(_causes.visible([gap for layer in layers for gap in layer.gaps if gap is not None])),
        merged=merged,
        has_letters=pitch >= _ROOM_FOR_LETTER,
        has_pairs=pairs > 1,
        height=_HEIGHT if under else _LEAF + 6,
    )


def _badness(layer: DrawnLayer, *, has_gaps: bool) -> float:
    """Return a number that is largest for the worst layer of a span."""
    if has_gaps:
        return layer.largest
    return layer.marked.severity


def _gap_axis(layers: Sequence[DrawnLayer]) -> Linear:
    return Linear.over(layer.largest for layer in layers)


def _var_axis(layers: Sequence[DrawnLayer]) -> Log:
    ranges = [layer.span for layer in layers if layer.span is not None]
    return Log.over(value for span in ranges for value in (span.min, span.median, span.max))


def _leaves(names: Sequence[str], pitch: float) -> list[Label]:
    """Return the names of all layers, or no names: a single missing name would look like an empty name."""
    short_names = leaves(names, blocks(names))
    if max(map(len, short_names)) * _LETTER > pitch - 4:
        return []
    return [Label(leaf, LEFT + i * pitch, LEFT + (i + 1) * pitch) for i, leaf in enumerate(short_names)]


def _blocks(names: Sequence[str], pitch: float) -> list[Label]:
    labels = []
    for block in blocks(names):
        start, end = LEFT + block.first * pitch, LEFT + (block.last + 1) * pitch
        short = block.path.rpartition(".")[2]
        text = next((text for text in (block.path, short) if len(text) * _LETTER <= end - start), "")
        if block.path:
            labels.append(Label(text, round(start + min(2, pitch / 4), 1), round(end - min(2, pitch / 4), 1)))
    return labels
