"""What an action did, as text: what it was, then every kind of change with the layers it concerns."""

from __future__ import annotations

from collections.abc import Iterable

from bnlab.records import Changes
from bnlab.report.text import plain

__all__ = ["render_changes"]

_MOST_LAYERS = 8


def render_changes(changes: Changes) -> str:
    """Return the receipt as plain text, one kind of change a line."""
    lines = [
        f"{changes.action}: {_layers(len({change.layer for change in changes.changes}))} changed, {_safety(changes)}"
    ]
    kinds: dict[str, list[str]] = {}
    for change in changes.changes:
        kinds.setdefault(f"{change.what}: {change.before} -> {change.after}", []).append(change.layer)
    for layer in changes.left_alone:
        kinds.setdefault(f"left alone: {layer.reason}", []).append(layer.layer)
    lines += [f"  {plain(kind)} ({_names(names)})" for kind, names in kinds.items()]
    if changes.metric is not None:
        outcome = "kept" if changes.kept else "taken back"
        lines.append(f"  metric: {changes.metric.before:.4g} -> {changes.metric.after:.4g}, {outcome}")
    return "\n".join([*lines, *(f"  {plain(note)}" for note in changes.notes)])


def _safety(changes: Changes) -> str:
    return {
        "exact": "output kept",
        "statistics": "buffers only",
        "behaviour": "behaviour changed",
        "manual": "nothing applied",
    }[changes.safety.value]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _names(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(plain(name) or "the model itself" for name in names))
    rest = len(distinct) - _MOST_LAYERS
    return ", ".join(distinct[:_MOST_LAYERS]) + (f" and {rest} more" if rest > 0 else "")
