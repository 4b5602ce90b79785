"""Renders a receipt as text: a summary, then every kind of change with the layers concerned."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from bnlab.records import Changes, Measurement, Recheck
from bnlab.report.phrases import SAFETY_PHRASES
from bnlab.report.rows import root_gap
from bnlab.report.text.bars import Marks
from bnlab.report.text.sheet import Report, write
from bnlab.wording import counted, listed

__all__ = ["render_changes", "renderable"]

_MAX_LAYERS = 8
_MAX_KINDS = 16


def render_changes(changes: Changes, *, width: int | None = None, encoding: str | None = None) -> str:
    """Return the receipt as plain text.

    Args:
        changes: The receipt.
        width: Largest width of a line, in columns; None for one line per kind of change, however long.
        encoding: Encoding that the text must fit; None for the encoding of standard output.
    """
    if width is not None:
        return write(renderable(changes), width=width, encoding=encoding)
    output_encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    head, *lines = _lines(changes, Marks.of(output_encoding))
    return "\n".join([head, *(f"  {line}" for line in lines)])


def renderable(changes: Changes) -> RenderableType:
    """Return the receipt for a rich console."""
    return Report(lambda sheet: _parts(_lines(changes, sheet.marks)))


def _parts(lines: Iterable[str]) -> Iterable[RenderableType]:
    for number, line in enumerate(lines):
        yield Padding(Text(line), (0, 0, 0, 2)) if number else Text(line, style="bold")


def _lines(changes: Changes, marks: Marks) -> Iterable[str]:
    """Yield a summary line, then one line per kind of change."""
    yield marks.plain(_head(changes))
    kinds: dict[str, list[str]] = {}
    for change in changes.changes:
        kinds.setdefault(f"{change.what}: {change.before} -> {change.after}", []).append(change.layer)
    yield from _kinds(kinds, marks)
    left: dict[str, list[str]] = {}
    for layer in changes.left_alone:
        left.setdefault(f"left alone: {layer.reason}", []).append(layer.layer)
    yield from _kinds(left, marks)
    if changes.metric is not None:
        outcome = "kept" if changes.kept else "taken back"
        yield f"metric: {changes.metric.before:.4g} -> {changes.metric.after:.4g}, {outcome}"
    if changes.recheck is not None:
        yield from _recheck(changes.recheck, marks)
    yield from _measurements(changes.measurements, marks)
    yield from (marks.plain(note) for note in changes.notes)


def _head(changes: Changes) -> str:
    count = len({change.layer for change in changes.changes})
    layers = counted(count, "layer")
    if changes.planned:
        return f"{changes.action}: {layers} to change, {SAFETY_PHRASES[changes.safety]}; nothing has been changed yet"
    if not changes.kept:
        return f"{changes.action}: {layers} changed and taken back: the model is as it was"
    return f"{changes.action}: {layers} changed, {SAFETY_PHRASES[changes.safety]}"


def _kinds(kinds: Mapping[str, Sequence[str]], marks: Marks) -> Iterable[str]:
    shown = list(kinds.items())[:_MAX_KINDS]
    yield from (f"{marks.plain(kind)} ({_names(names, marks)})" for kind, names in shown)
    if len(kinds) > len(shown):
        yield f"... and {len(kinds) - len(shown)} more; the JSON form lists all of them"


def _measurements(measurements: Sequence[Measurement], marks: Marks) -> Iterable[str]:
    """Yield a line per measured quantity: its values for the whole model, and the largest value of a layer."""
    for what in dict.fromkeys(measurement.what for measurement in measurements):
        of_quantity = [measurement for measurement in measurements if measurement.what == what]
        worst = max((m for m in of_quantity if m.layer is not None), key=lambda m: m.value, default=None)
        values = [f"{m.value:.2g} {m.unit}" for m in of_quantity if m.layer is None]
        if worst is not None:
            values.append(f"at most {worst.value:.2g} {worst.unit} ({worst.layer or 'the model itself'})")
        yield marks.plain(f"{what}: {', '.join(values)}")


def _recheck(recheck: Recheck, marks: Marks) -> Iterable[str]:
    """Yield the counts of findings and the largest gap between the modes, before and after."""
    before, after = recheck.before, recheck.after
    counts = f"{counted(before.errors, 'error')} and {counted(before.warnings, 'warning')}"
    text = f"findings: {counts} -> {after.errors} and {after.warnings}"
    if recheck.appeared:
        text += f"; new: {', '.join(marks.plain(item) for item in recheck.appeared[:_MAX_LAYERS])}"
    yield text
    measured = [gap for gap in recheck.gaps if gap.before is not None and gap.after is not None]
    if measured:
        first = _largest({gap.layer: gap.before or {} for gap in measured})
        last = _largest({gap.layer: gap.after or {} for gap in measured})
        yield marks.plain(f"gap between the modes: {first} -> {last}")


def _largest(gaps: Mapping[str, Mapping[str, float]]) -> str:
    """Return the largest gap and its layer, in words."""
    layer = max(gaps, key=lambda name: root_gap(gaps[name]))
    return f"up to {root_gap(gaps[layer]):.2g} std ({layer or 'the model itself'})"


def _names(names: Iterable[str], marks: Marks) -> str:
    distinct = list(dict.fromkeys(marks.plain(name) or "the model itself" for name in names))
    return listed(distinct, _MAX_LAYERS)
