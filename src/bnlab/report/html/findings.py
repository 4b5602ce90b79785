"""The findings of a diagnosis by check: the evidence as rows, why it matters, and what helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Finding, Level, Quantity
from bnlab.report.html.escaping import channels, counted, number
from bnlab.report.html.remedies import Case, Way, way
from bnlab.report.rows import by_code

__all__ = ["Group", "Row", "groups"]

_MOST_ROWS = 200
_FEWEST_ROWS = 3
_MOST_REMEDIES = 4


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        layer: Layer path; None where it is about the whole network.
        index: Of the layer; None where the page has none of that name.
        channels: Which channels.
        measured: What was measured, one quantity a line.
        threshold: What it was compared with.
        value: The first number that was measured, to sort by; None without one.
        message: What was found.
    """

    layer: str | None
    index: int | None
    channels: str
    measured: str
    threshold: str
    value: float | None
    message: str


@dataclass(frozen=True)
class Group:
    """What one check found.

    Attributes:
        code: Code of the check.
        level: How severe.
        where: In how many layers.
        why: What it does to a user of the network.
        rows: The findings that are shown.
        hidden: How many are not.
        ways: What helps, best first.
    """

    code: str
    level: Level
    where: str
    why: str
    rows: tuple[Row, ...]
    hidden: int
    ways: tuple[Way, ...]


def groups(record: DiagnosisRecord, shown: Sequence[Finding], *, room: int = 600) -> list[Group]:
    """Return the findings that are shown by code, in the order in which the codes come first.

    Args:
        record: The diagnosis.
        shown: Its findings that are shown.
        room: How many rows the page has room for: each code gets an equal part, and a few rows in any case.
    """
    alike = by_code(shown)
    limit = min(_MOST_ROWS, max(_FEWEST_ROWS, room // max(1, len(alike))))
    places = {layer.name: place for place, layer in enumerate(record.layers)}
    return [_group(record, findings, places, limit) for findings in alike]


def _group(record: DiagnosisRecord, findings: Sequence[Finding], places: Mapping[str, int], limit: int) -> Group:
    first = findings[0]
    layers = list(dict.fromkeys(finding.layer for finding in findings if finding.layer is not None))
    case = Case(first.code, first.level, record.target, layers, is_everywhere=set(layers) >= set(places))
    names = dict.fromkeys([*first.remedies[:_MOST_REMEDIES], "manual"])
    return Group(
        code=first.code,
        level=first.level,
        where=f"in {counted(len(layers), 'layer')}" if layers else "in the network",
        why=first.why,
        rows=tuple(_row(finding, record, places) for finding in findings[:limit]),
        hidden=max(0, len(findings) - limit),
        ways=tuple(way(name, case) for name in names),
    )


def _row(finding: Finding, record: DiagnosisRecord, places: Mapping[str, int]) -> Row:
    index = None if finding.layer is None else places.get(finding.layer)
    width = 0 if index is None else record.layers[index].channels
    return Row(
        layer=finding.layer,
        index=index,
        channels=channels(finding.channels, width),
        measured=_quantities(finding.measured),
        threshold=_quantities(finding.threshold),
        value=next((quantity.value for quantity in finding.measured.values()), None),
        message=finding.message,
    )


def _quantities(quantities: Mapping[str, Quantity]) -> str:
    """Return quantities line by line."""
    return "\n".join(f"{name} {number(quantity.value)} {quantity.unit}" for name, quantity in quantities.items())
