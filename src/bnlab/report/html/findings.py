"""Prepares the problems of a diagnosis for a page: cause and symptoms, the findings as rows, and the remedies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Finding, Level, Quantity
from bnlab.report.html.escaping import channels, counted, number
from bnlab.report.html.remedies import Case, RemedySteps, steps_for
from bnlab.report.problems import Problem
from bnlab.wording import enumerated

__all__ = ["Group", "Row", "groups"]

_MAX_ROWS = 200
_FEWEST_ROWS = 3
_MAX_REMEDIES = 4
_MAX_LAYERS = 8
_MAX_SYMPTOMS = 8


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        code: Code of the check.
        layer: Layer path; None if the finding is about the whole network.
        index: Index of the layer; None if the page has no layer of that name.
        channels: The channels concerned, in words.
        measured: The measured quantities, one per line.
        threshold: The quantities they were compared with, one per line.
        value: The first measured number, to sort by; None without one.
        message: The message of the finding.
    """

    code: str
    layer: str | None
    index: int | None
    channels: str
    measured: str
    threshold: str
    value: float | None
    message: str


@dataclass(frozen=True)
class Group:
    """A problem: the findings on one cause and on its symptoms.

    Attributes:
        code: Code of the check that names the cause.
        name: Name of that check; "" if it is unknown.
        level: How severe the problem is.
        where: The number of layers concerned, in words.
        also: The codes of the symptoms, in words; "" without symptoms.
        worst: The worst finding on the cause.
        why: The consequence for a user of the network.
        layers: The first few layers concerned, each with its index as in `Row`; empty if there is only one layer.
        more_layers: The number of layers that are not listed.
        rows: The findings that are shown.
        hidden: The number of findings that are not shown.
        remedies: The remedies, best first.
    """

    code: str
    name: str
    level: Level
    where: str
    also: str
    worst: Row
    why: str
    layers: tuple[tuple[str, int | None], ...]
    more_layers: int
    rows: tuple[Row, ...]
    hidden: int
    remedies: tuple[RemedySteps, ...]

    @property
    def evidence(self) -> str:
        """The heading of the rows, with the number of all findings."""
        return f"{counted(len(self.rows) + self.hidden, 'finding')}: measured values and thresholds"


def groups(record: DiagnosisRecord, shown: Sequence[Problem], *, room: int = 600) -> list[Group]:
    """Return the shown problems as the page draws them, in the same order.

    Args:
        record: The diagnosis.
        shown: The problems to show.
        room: Number of rows that fit on the page. Each problem gets an equal part, and at least a few rows.
    """
    limit = min(_MAX_ROWS, max(_FEWEST_ROWS, room // max(1, len(shown))))
    places = {layer.name: place for place, layer in enumerate(record.layers)}
    return [_group(record, problem, places, limit) for problem in shown]


def _group(record: DiagnosisRecord, problem: Problem, places: Mapping[str, int], limit: int) -> Group:
    listed = problem.layers[:_MAX_LAYERS] if len(problem.layers) > 1 else ()
    return Group(
        code=problem.code,
        name=problem.name,
        level=problem.level,
        where=f"in {counted(len(problem.layers), 'layer')}" if problem.layers else problem.where,
        also=enumerated(problem.symptoms, _MAX_SYMPTOMS),
        worst=_row(problem.worst, record, places),
        why=problem.worst.why,
        layers=tuple((layer, places.get(layer)) for layer in listed),
        more_layers=len(problem.layers) - len(listed) if listed else 0,
        rows=tuple(_row(finding, record, places) for finding in problem.findings[:limit]),
        hidden=max(0, len(problem.findings) - limit),
        remedies=tuple(_remedies(record, problem, set(places))),
    )


def _remedies(record: DiagnosisRecord, problem: Problem, everywhere: set[str]) -> Iterable[RemedySteps]:
    """Yield the remedies of a problem. Each is for the layers whose findings name it."""
    for name in dict.fromkeys([*problem.remedies[:_MAX_REMEDIES], "manual"]):
        mended = [finding for finding in problem.findings if name in finding.remedies] or [problem.worst]
        code = problem.code if name == "manual" else Counter(finding.code for finding in mended).most_common(1)[0][0]
        layers = list(dict.fromkeys(finding.layer for finding in mended if finding.layer is not None))
        yield steps_for(name, Case(code, problem.level, record.target, layers, is_everywhere=set(layers) >= everywhere))


def _row(finding: Finding, record: DiagnosisRecord, places: Mapping[str, int]) -> Row:
    index = None if finding.layer is None else places.get(finding.layer)
    width = 0 if index is None else record.layers[index].channels
    return Row(
        code=finding.code,
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
