"""Prepares the history of a watched training run for a page: charts and numbers of the layers with events."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TypeAlias

from bnlab.records import DiagnosisRecord, Finding, LayerHistory
from bnlab.report.html import history_chart
from bnlab.report.html.escaping import number
from bnlab.report.html.history_chart import Chart, Event, step_text
from bnlab.report.html.markers import by_layer
from bnlab.report.html.scale import Linear

__all__ = ["History", "Row", "ShownLayer", "draw"]

_MAX_LAYERS = 12
_MAX_EVENTS = 10
_MAX_ROWS = 50
_OF_A_RUN = re.compile("BN6[0-9]{2}")
_VARIANCE = "running_var (mean), input\N{SUPERSCRIPT TWO}"
_STATISTICS = ("running_mean (root mean square), input", _VARIANCE, "lag behind the batches, std")
_HEADERS = ("running_mean, input", "running_var, input\N{SUPERSCRIPT TWO}", "lag, std")

_Sample: TypeAlias = tuple[float, list[float | None]]
"""A step, and each of the statistics at it."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a step, the statistics at it where they were sampled, and the codes of the events at it."""

    step: str
    values: tuple[str, ...]
    codes: str


@dataclass(frozen=True)
class ShownLayer:
    """A layer with events.

    Attributes:
        name: Layer path.
        index: Index of the layer; None if the page has no layer of that name.
        events: The events in words.
        charts: One drawing for each statistic.
        rows: Some of the samples, and the events.
        left_out: Number of the samples that are not in `rows`.
    """

    name: str
    index: int | None
    events: str
    charts: tuple[Chart, ...]
    rows: tuple[Row, ...]
    left_out: int


@dataclass(frozen=True)
class History:
    """The layers with events.

    Attributes:
        layers: Those that are drawn, the most consequential first.
        more: Number of those that are not drawn.
        headers: Names of the statistics and their units, for the tables.
    """

    layers: tuple[ShownLayer, ...]
    more: int
    headers: tuple[str, ...] = _HEADERS


def draw(record: DiagnosisRecord, findings: Iterable[Finding]) -> History | None:
    """Return the layers with events; None if no layer with a history has one.

    Args:
        record: The diagnosis.
        findings: The findings to show, most consequential first.
    """
    histories = {history.layer: history for history in record.history or () if history.steps}
    events = [finding for finding in findings if _OF_A_RUN.fullmatch(finding.code) and finding.layer in histories]
    names = list(dict.fromkeys(finding.layer for finding in events if finding.layer is not None))
    if not names:
        return None
    places = {layer.name: place for place, layer in enumerate(record.layers)}
    shown = names[:_MAX_LAYERS]
    return History(
        layers=tuple(
            _layer(histories[name], places.get(name), marked.findings)
            for name, marked in zip(shown, by_layer(events, shown), strict=True)
        ),
        more=len(names) - len(shown),
    )


def _layer(history: LayerHistory, index: int | None, findings: Sequence[Finding]) -> ShownLayer:
    events = list(dict.fromkeys(map(_event, findings)))
    drawn = sorted(events[:_MAX_EVENTS], key=lambda event: math.inf if event.step is None else event.step)
    phrases = [event.phrase for event in drawn]
    if len(events) > len(drawn):
        phrases.append(f"and {len(events) - len(drawn):,} more")
    samples = _samples(history)
    steps = [step for step, _ in samples] + [event.step for event in drawn if event.step is not None]
    axis = Linear(max(steps), min(steps))
    rows, left_out = _rows(samples, drawn)
    return ShownLayer(
        name=history.layer,
        index=index,
        events=", ".join(phrases),
        charts=tuple(
            history_chart.draw(
                name,
                [(step, value) for step, values in samples if (value := values[place]) is not None],
                drawn,
                axis,
                may_be_log=name == _VARIANCE,
            )
            for place, name in enumerate(_STATISTICS)
        ),
        rows=rows,
        left_out=left_out,
    )


def _event(finding: Finding) -> Event:
    measured = finding.measured.get("step")
    step = None if measured is None or not math.isfinite(measured.value) else measured.value
    return Event(finding.code, finding.level, step, finding.message)


def _samples(history: LayerHistory) -> list[_Sample]:
    """Return the statistics at each step, ascending; None where the record, which comes from a file, has too few."""
    series = (history.running_mean, history.running_var, history.lag)
    rows = islice(zip_longest(history.steps, *series), len(history.steps))
    return sorted(((float(step), values) for step, *values in rows), key=lambda sample: sample[0])


def _rows(samples: Sequence[_Sample], events: Sequence[Event]) -> tuple[tuple[Row, ...], int]:
    """Return the rows of the table, and the number of the samples that are left out.

    Samples at the step of an event are shown, and so are some at even distances between the first and the last.
    """
    codes: dict[float, str] = {}
    for event in events:
        if event.step is not None:
            codes[event.step] = f"{codes[event.step]}, {event.code}" if event.step in codes else event.code
    some = min(len(samples), _MAX_ROWS)
    places = {round(place * (len(samples) - 1) / max(some - 1, 1)) for place in range(some)}
    at_event = [place for place, (step, _) in enumerate(samples) if step in codes][:_MAX_ROWS]
    shown = [samples[place] for place in sorted(places.union(at_event))]
    without_sample: list[_Sample] = [
        (step, [None] * len(_HEADERS)) for step in codes.keys() - {step for step, _ in shown}
    ]
    rows = sorted([*shown, *without_sample], key=lambda sample: sample[0])
    return (
        tuple(
            Row(step_text(step), tuple(number(value, 4) for value in values), codes.get(step, ""))
            for step, values in rows
        ),
        len(samples) - len(shown),
    )
