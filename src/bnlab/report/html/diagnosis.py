"""Renders a diagnosis as a page: the conclusion, the network, the problems and every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Level
from bnlab.report.html import causes as _causes
from bnlab.report.html import findings as _findings
from bnlab.report.html import history as _history
from bnlab.report.html import layer_data as _layer_data
from bnlab.report.html import layer_table as _layer_table
from bnlab.report.html import network as _network
from bnlab.report.html.columns import DrawnLayer
from bnlab.report.html.environment import page
from bnlab.report.html.markers import LayerFindings, by_layer
from bnlab.report.html.network import Network
from bnlab.report.phrases import LEVEL_WORDS
from bnlab.report.problems import Problem, at_least, counts, problems_of
from bnlab.report.rows import findings_at_least, metric_rows, outcomes_of

__all__ = ["network_of", "render", "render_many"]


_MAX_ROWS = 2_000
"""Rows of findings, over all targets of a page."""


@dataclass(frozen=True)
class _TargetSection:
    """A diagnosis among many.

    Attributes:
        record: The diagnosis.
        counts: The number of its problems of each level, most severe first.
        summary: The same counts in words.
        groups: The problems that are shown.
        codes: The codes of their causes.
        hidden: The number of problems that are not shown.
    """

    record: DiagnosisRecord
    counts: tuple[int, ...]
    summary: str
    groups: list[_findings.Group]
    codes: str
    hidden: int


def render(record: DiagnosisRecord, *, level: Level = Level.INFO) -> str:
    """Return one self-contained page.

    Args:
        record: The diagnosis.
        level: Problems below this level are only counted.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    problems = problems_of(record)
    shown = at_least(problems, level)
    shown_findings = findings_at_least(record, level)
    marked = by_layer(shown_findings, [layer.name for layer in record.layers])
    return page(
        "diagnosis.html.j2",
        record=record,
        summary=_summary(problems),
        cards=metric_rows(record.numbers),
        slices=_causes.slices(record.causes),
        network=network_of(record, marked),
        groups=_findings.groups(record, shown),
        hidden=len(problems) - len(shown),
        history=_history.draw(record, shown_findings),
        words=LEVEL_WORDS,
        headers=_layer_table.headers(record.layers),
        rows=_layer_table.rows(record.layers, marked),
        outcomes=outcomes_of(record),
        data=_layer_data.layer_data(record, marked),
    )


def render_many(records: Sequence[DiagnosisRecord], *, level: Level = Level.INFO) -> str:
    """Return one self-contained page for several targets: a table of the targets, then the findings of each.

    Args:
        records: The diagnoses, in the order in which they are shown.
        level: Problems below this level are only counted.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    room = _MAX_ROWS // max(1, len(records))
    targets = [_target(record, level, room) for record in records]
    return page("diagnoses.html.j2", targets=targets, totals=_totals(targets), words=LEVEL_WORDS)


def network_of(record: DiagnosisRecord, marked: Sequence[LayerFindings] | None = None) -> Network | None:
    """Return the drawing of the network of a diagnosis; None if there is nothing to draw.

    Args:
        record: The diagnosis.
        marked: The findings to mark, for each layer; None marks all of them.
    """
    if marked is None:
        marked = by_layer(record.findings, [layer.name for layer in record.layers])
    return _network.draw(
        [
            DrawnLayer(layer.name, (layer.gap,), layer.running_var, layer_findings)
            for layer, layer_findings in zip(record.layers, marked, strict=True)
        ]
    )


def _summary(problems: Sequence[Problem]) -> str:
    return counts(problems, separator=",")


def _target(record: DiagnosisRecord, level: Level, room: int) -> _TargetSection:
    problems = problems_of(record)
    shown = at_least(problems, level)
    return _TargetSection(
        record=record,
        counts=tuple(sum(problem.level is each for problem in problems) for each in Level),
        summary=_summary(problems),
        groups=_findings.groups(record, shown, room=room),
        codes=" ".join(dict.fromkeys(problem.code for problem in shown)),
        hidden=len(problems) - len(shown),
    )


def _totals(targets: Sequence[_TargetSection]) -> Counter[str]:
    """Return the counts summed over all targets."""
    totals: Counter[str] = Counter(targets=len(targets))
    for target in targets:
        totals.update(layers=target.record.summary.layers)
        totals.update(dict(zip(("errors", "warnings", "infos"), target.counts, strict=True)))
    return totals
