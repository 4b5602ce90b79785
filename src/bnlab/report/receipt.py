"""What an action did, as text: what it was, then every kind of change with the layers it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bnlab.records import Changes, Measurement, Recheck
from bnlab.report.text import SAFETY_PHRASES, plain

__all__ = ["render_changes"]

_MOST_LAYERS = 8
_MOST_KINDS = 16


def render_changes(changes: Changes) -> str:
    """Return the receipt as plain text, one kind of change a line."""
    lines = [_head(changes)]
    kinds: dict[str, list[str]] = {}
    for change in changes.changes:
        kinds.setdefault(f"{change.what}: {change.before} -> {change.after}", []).append(change.layer)
    lines += _kinds(kinds)
    left: dict[str, list[str]] = {}
    for layer in changes.left_alone:
        left.setdefault(f"left alone: {layer.reason}", []).append(layer.layer)
    lines += _kinds(left)
    if changes.metric is not None:
        outcome = "kept" if changes.kept else "taken back"
        lines.append(f"  metric: {changes.metric.before:.4g} -> {changes.metric.after:.4g}, {outcome}")
    if changes.recheck is not None:
        lines.append(f"  {_recheck(changes.recheck)}")
    lines += [f"  {line}" for line in _measurements(changes.measurements)]
    return "\n".join([*lines, *(f"  {plain(note)}" for note in changes.notes)])


def _head(changes: Changes) -> str:
    count = len({change.layer for change in changes.changes})
    layers = "1 layer" if count == 1 else f"{count} layers"
    if changes.planned:
        return f"{changes.action}: {layers} to change, {SAFETY_PHRASES[changes.safety]}; nothing was changed yet"
    if not changes.kept:
        return f"{changes.action}: {layers} changed and taken back: the model is as it was"
    return f"{changes.action}: {layers} changed, {SAFETY_PHRASES[changes.safety]}"


def _kinds(kinds: Mapping[str, Sequence[str]]) -> Iterable[str]:
    shown = list(kinds.items())[:_MOST_KINDS]
    yield from (f"  {plain(kind)} ({_names(names)})" for kind, names in shown)
    if len(kinds) > len(shown):
        yield f"  ... and {len(kinds) - len(shown)} more, all of them in the JSON form"


def _measurements(measurements: Sequence[Measurement]) -> Iterable[str]:
    """Yield a line for each thing that was measured: on the whole model, and the largest on a layer."""
    for what in dict.fromkeys(measurement.what for measurement in measurements):
        found = [measurement for measurement in measurements if measurement.what == what]
        worst = max((m for m in found if m.layer is not None), key=lambda m: m.value, default=None)
        told = [f"{m.value:.2g} {m.unit}" for m in found if m.layer is None]
        if worst is not None:
            told.append(f"at most {worst.value:.2g} {worst.unit} ({plain(worst.layer or 'the model itself')})")
        yield f"{what}: {', '.join(told)}"


def _recheck(recheck: Recheck) -> str:
    before, after = recheck.before, recheck.after
    text = f"checks: {before.errors} errors and {before.warnings} warnings -> {after.errors} and {after.warnings}"
    if recheck.appeared:
        text += f"; new: {', '.join(plain(item) for item in recheck.appeared[:_MOST_LAYERS])}"
    return text


def _names(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(plain(name) or "the model itself" for name in names))
    rest = len(distinct) - _MOST_LAYERS
    return ", ".join(distinct[:_MOST_LAYERS]) + (f" and {rest} more" if rest > 0 else "")
