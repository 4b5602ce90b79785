"""Draws one statistic of a layer over the steps of a training run, with a flag at the step of each event."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from bnlab.records import Level
from bnlab.report.html.scale import WIDE, Linear, Log, short

__all__ = ["Chart", "Event", "Flag", "Label", "draw", "step_text"]

_WIDTH, _LEFT = 340.0, 52.0
_ROOM_FOR_FLAG = 40.0
_RIGHT = _WIDTH - _ROOM_FOR_FLAG
_HEADING, _LANE, _PLOT, _UNDER = 22.0, 13.0, 120.0, 36.0
_LETTER, _SPACE = 6.4, 10.0
_EXACT = 1e10


@dataclass(frozen=True)
class Event:
    """An event in a layer.

    Attributes:
        code: Code of the check.
        level: How severe it is.
        step: The number of optimizer steps before it; None if it is not known.
        message: The message of its finding.
    """

    code: str
    level: Level
    step: float | None
    message: str

    @property
    def phrase(self) -> str:
        """The code and the step, such as "BN603 at step 300"."""
        return self.code if self.step is None else f"{self.code} at step {step_text(self.step)}"


@dataclass(frozen=True)
class Label:
    """Text beside an axis, at a position in pixels."""

    at: float
    text: str


@dataclass(frozen=True)
class Flag:
    """The mark of an event: a vertical line at `x`, from its code at `y` down to the axis."""

    x: float
    y: float
    event: Event


@dataclass(frozen=True)
class Chart:
    """The drawing of one statistic; positions and sizes are in pixels.

    Attributes:
        name: The statistic and its unit.
        height: Height of the drawing.
        top: Upper end of the vertical axis.
        foot: Lower end of the vertical axis.
        values: Labels of the vertical axis.
        steps: Labels of the horizontal axis.
        path: The line through the samples, as SVG path data. It has a gap where samples are not finite.
        dots: Centres of the samples without a neighbour that is finite.
        flags: The events.
        description: The line and the events in words.
        log: Whether the vertical axis is logarithmic.
    """

    name: str
    height: float
    top: float
    foot: float
    values: tuple[Label, ...]
    steps: tuple[Label, ...]
    path: str
    dots: tuple[tuple[float, float], ...]
    flags: tuple[Flag, ...]
    description: str
    log: bool
    width: float = _WIDTH
    left: float = _LEFT
    right: float = _RIGHT


def step_text(step: float) -> str:
    """Return a number of steps with separators; one that is out of all reason in six digits."""
    return f"{step:,.0f}" if abs(step) < _EXACT else f"{step:.6g}"


def draw(
    name: str,
    samples: Sequence[tuple[float, float]],
    events: Sequence[Event],
    axis: Linear,
    *,
    may_be_log: bool = False,
) -> Chart:
    """Return the drawing of one statistic.

    Args:
        name: The statistic and its unit.
        samples: The steps, ascending, and the statistic at each.
        events: The events. Those without a step have no flag.
        axis: The horizontal axis, over all samples and events of the layer.
        may_be_log: Whether a wide range of positive values is drawn on a logarithmic axis.
    """
    finite = [value for _, value in samples if math.isfinite(value)]
    is_log = may_be_log and bool(finite) and min(finite) > 0 and max(finite) / WIDE > min(finite)
    vertical = Log.over(finite) if is_log else Linear.around(finite)
    flags = _flags(events, axis)
    top = _HEADING + max((flag.y for flag in flags), default=0.0)
    foot = top + _PLOT
    points = [
        (_x(axis, step), foot - _PLOT * vertical.at(value) if math.isfinite(value) else None) for step, value in samples
    ]
    runs = list(_runs(_thinned(points)))
    return Chart(
        name=name,
        height=foot + _UNDER,
        top=top,
        foot=foot,
        values=tuple(Label(round(foot - _PLOT * tick.at, 1), tick.label) for tick in vertical.ticks() if finite),
        steps=_step_labels(axis),
        path="".join(_line(run) for run in runs if len(run) > 1),
        dots=tuple(run[0] for run in runs if len(run) == 1),
        flags=tuple(Flag(flag.x, round(top - flag.y, 1), flag.event) for flag in flags),
        description=_description(samples, events),
        log=is_log,
    )


def _x(axis: Linear, step: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * axis.at(step), 1)


def _step_labels(axis: Linear) -> tuple[Label, ...]:
    """Return labels at whole steps, as many as have room."""
    ticks = [tick for tick in axis.ticks(lambda step: step_text(step) if step == round(step) else "") if tick.label]
    width = max((len(tick.label) for tick in ticks), default=0) * _LETTER + _SPACE
    room = max(int((_RIGHT - _LEFT) / width), 1)
    stride = math.ceil(len(ticks) / room)
    return tuple(Label(round(_LEFT + (_RIGHT - _LEFT) * tick.at, 1), tick.label) for tick in ticks[::stride])


def _flags(events: Sequence[Event], axis: Linear) -> list[Flag]:
    """Return the flags, left to right, `y` being the height above the plot.

    Codes are written to the right of their lines. A code that would cross the line of a later event is written above
    the code of that event, where the later line has ended.
    """
    flags: list[Flag] = []
    for event in sorted((event for event in events if event.step is not None), key=_step_of, reverse=True):
        x = _x(axis, _step_of(event))
        higher_than = [flag.y for flag in flags if flag.x < x + _ROOM_FOR_FLAG]
        flags.append(Flag(x, max(higher_than, default=0.0) + _LANE, event))
    return flags[::-1]


def _step_of(event: Event) -> float:
    return 0.0 if event.step is None else event.step


def _thinned(points: Iterable[tuple[float, float | None]]) -> Iterable[tuple[float, float | None]]:
    """Yield the points that make a difference: the highest and the lowest for each pixel, and that one is missing."""
    for _, group in groupby(points, key=lambda point: int(point[0])):
        column = list(group)
        heights = [(y, place) for place, (_, y) in enumerate(column) if y is not None]
        kept = {min(heights)[1], max(heights)[1]} if heights else set()
        missing = next((place for place, (_, y) in enumerate(column) if y is None), None)
        for place in sorted(kept if missing is None else kept | {missing}):
            yield column[place]


def _runs(points: Iterable[tuple[float, float | None]]) -> Iterable[list[tuple[float, float]]]:
    """Yield the points between two gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            run.append((x, round(y, 1)))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _line(run: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in run)


def _description(samples: Sequence[tuple[float, float]], events: Sequence[Event]) -> str:
    """Return the line and the events in words."""
    finite = [sample for sample in samples if math.isfinite(sample[1])]
    parts = ["No sample is finite."]
    if finite:
        (start, first), (end, last) = finite[0], finite[-1]
        values = [value for _, value in finite]
        ends = f"From {short(first)} at step {step_text(start)} to {short(last)} at step {step_text(end)}"
        parts = [f"{ends}, between {short(min(values))} and {short(max(values))}."]
        if len(finite) < len(samples):
            parts.append(f"{len(samples) - len(finite):,} of {len(samples):,} samples are not finite.")
    if events:
        parts.append(f"Events: {', '.join(event.phrase for event in events)}.")
    return " ".join(parts)
