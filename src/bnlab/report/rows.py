"""What every report shows of a diagnosis: which findings and layers, in which order, and what became of the checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Finding, Level, Numbers, Outcome, Status

__all__ = ["Outcomes", "by_code", "findings_at_least", "layers_to_show", "metric_rows", "outcomes_of", "root_gap"]


@dataclass(frozen=True)
class Outcomes:
    """What became of the checks.

    Attributes:
        crashed: Those that crashed.
        skipped: The codes for each reason.
        passed: The codes.
        with_findings: The codes.
    """

    crashed: tuple[Outcome, ...]
    skipped: Mapping[str, tuple[str, ...]]
    passed: tuple[str, ...]
    with_findings: tuple[str, ...]


def findings_at_least(diagnosis: DiagnosisRecord, level: Level) -> list[Finding]:
    """Return the findings that are shown: those as severe as the level or more so."""
    return [finding for finding in diagnosis.findings if finding.level.at_least(level)]


def by_code(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Return the findings of each check, in the order in which the codes come first."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    return list(groups.values())


def layers_to_show(with_findings: Sequence[bool], limit: int) -> list[int]:
    """Return the indices of the layers to show, in their order: those with findings first of all.

    Args:
        with_findings: Of each layer, whether something was found in it.
        limit: How many there is room for.
    """
    return sorted(sorted(range(len(with_findings)), key=lambda index: (not with_findings[index], index))[:limit])


def metric_rows(numbers: Numbers | None) -> list[tuple[str, float]]:
    """Return the metric under each choice of data and statistics that was measured."""
    if numbers is None:
        return []
    rows = (
        ("training data, batch statistics", numbers.train_batch),
        ("data, batch statistics", numbers.eval_batch),
        ("data, running statistics (eval mode)", numbers.eval_running),
        ("data, recalibrated statistics", numbers.eval_recalibrated),
    )
    return [(name, value) for name, value in rows if value is not None]


def outcomes_of(diagnosis: DiagnosisRecord) -> Outcomes:
    """Return what became of the checks, those that were skipped for one reason together."""
    by_status = {status: [o for o in diagnosis.outcomes if o.status is status] for status in Status}
    reasons = dict.fromkeys(outcome.reason or "" for outcome in by_status[Status.SKIPPED])
    return Outcomes(
        crashed=tuple(by_status[Status.CRASHED]),
        skipped={
            reason: tuple(o.code for o in by_status[Status.SKIPPED] if (o.reason or "") == reason) for reason in reasons
        },
        passed=tuple(outcome.code for outcome in by_status[Status.PASSED]),
        with_findings=tuple(outcome.code for outcome in by_status[Status.FINDINGS]),
    )


def root_gap(gap: Mapping[str, float]) -> float:
    """Return a gap by cause, which is a mean square, in standard deviations."""
    return float(max(gap.get("total", 0.0), 0.0) ** 0.5)
