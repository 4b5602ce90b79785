"""Groups the findings of a diagnosis by check: the evidence as rows, the consequence and the remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Finding, Level, Quantity
from bnlab.report.html.escaping import channels, counted, number
from bnlab.report.html.remedies import Case, RemedySteps, steps_for
from bnlab.report.rows import by_code

__all__ = ["Group", "Row", "groups"]

_MAX_ROWS = 200
_FEWEST_ROWS = 3
_MAX_REMEDIES = 4


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        layer: Layer path; None if the finding is about the whole network.
        index: Index of the layer; None if the page has no layer of that name.
        channels: The channels concerned, in words.
        measured: The measured quantities, one per line.
        threshold: The quantities they were compared with, one per line.
        value: The first measured number, to sort by; None without one.
        message: The message of the finding.
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
    """The findings of one check.

    Attributes:
        code: Code of the check.
        level: How severe the findings are.
        where: The number of layers concerned, in words.
        why: The consequence for a user of the network.
        rows: The findings that are shown.
        hidden: The number of findings that are not shown.
        remedies: The remedies, best first.
    """

    code: str
    level: Level
    where: str
    why: str
    rows: tuple[Row, ...]
    hidden: int
    remedies: tuple[RemedySteps, ...]


def groups(record: DiagnosisRecord, shown: Sequence[Finding], *, room: int = 600) -> list[Group]:
    """Return the shown findings grouped by code, in the order in which each code first appears.

    Args:
        record: The diagnosis.
        shown: The findings to show.
        room: Number of rows that fit on the page. Each code gets an equal part, and at least a few rows.
    """
    alike = by_code(shown)
    limit = min(_MAX_ROWS, max(_FEWEST_ROWS, room // max(1, len(alike))))
    places = {layer.name: place for place, layer in enumerate(record.layers)}
    return [_group(record, findings, places, limit) for findings in alike]


def _group(record: DiagnosisRecord, findings: Sequence[Finding], places: Mapping[str, int], limit: int) -> Group:
    first = findings[0]
    layers = list(dict.fromkeys(finding.layer for finding in findings if finding.layer is not None))
    case = Case(first.code, first.level, record.target, layers, is_everywhere=set(layers) >= set(places))
    names = dict.fromkeys([*first.remedies[:_MAX_REMEDIES], "manual"])
    return Group(
        code=first.code,
        level=first.level,
        where=f"in {counted(len(layers), 'layer')}" if layers else "in the network",
        why=first.why,
        rows=tuple(_row(finding, record, places) for finding in findings[:limit]),
        hidden=max(0, len(findings) - limit),
        remedies=tuple(steps_for(name, case) for name in names),
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
    """Return the quantities, one per line."""
    return "\n".join(f"{name} {number(quantity.value)} {quantity.unit}" for name, quantity in quantities.items())
