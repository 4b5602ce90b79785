"""Renders experiments as a page: every claim with its verdict, then each experiment with its figure and numbers."""

from __future__ import annotations

import hashlib
import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnlab.errors import MissingPackage
from bnlab.records import ClaimRecord, Estimate, ExperimentRecord, Verdict
from bnlab.records.experiment import OUTCOMES
from bnlab.report import figure
from bnlab.report.html import experiment_figure as pictures
from bnlab.report.html.environment import page
from bnlab.report.html.escaping import counted
from bnlab.report.html.intervals import WIDTH, Plot, plot
from bnlab.report.phrases import expected
from bnlab.report.text import experiment as text

__all__ = ["compact", "render"]

_MAX_ESTIMATES = 9


@dataclass(frozen=True)
class _Claim:
    """A claim as the page shows it, with its id, its limits in words and the plot of its estimates."""

    record: ClaimRecord
    id: str
    expected: str
    plot: Plot | None
    counts: str

    @classmethod
    def of(cls, record: ClaimRecord, id_: str) -> _Claim:
        return cls(record, id_, expected(record), plot(record), _counts(record))

    @property
    def folded(self) -> bool:
        """Whether the claim has too many estimates to show them all at once."""
        return len(self.record.estimates) > _MAX_ESTIMATES


@dataclass(frozen=True)
class _Experiment:
    """An experiment as the page shows it, with its id and, if it can be drawn, its figure."""

    record: ExperimentRecord
    id: str
    claims: tuple[_Claim, ...]
    still: str | None
    specification: dict[str, Any] | None
    numbers: list[tuple[float | str, ...]]

    @classmethod
    def of(cls, record: ExperimentRecord, id_: str, *, interactive: bool) -> _Experiment:
        still = pictures.still(record, id_) if figure.can_draw() else None
        return cls(
            record,
            id_,
            claims=tuple(_Claim.of(claim, f"{id_}-claim-{i}") for i, claim in enumerate(record.claims, start=1)),
            still=still,
            specification=pictures.specification(record) if interactive and still is not None else None,
            numbers=pictures.numbers(record),
        )

    @property
    def rows(self) -> int:
        """Number of rows of the table behind the figure."""
        return max((len(column.labels or column.numbers or ()) for column in self.record.table), default=0)


def render(records: Sequence[ExperimentRecord], *, interactive: bool = False) -> str:
    """Return one self-contained page with all records.

    Without altair or vl-convert, tables of numbers replace the figures.

    Args:
        records: The experiments, in the order in which they are shown.
        interactive: Whether figures show values under the pointer. This adds about 1 MB to the page.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    experiments = [
        _Experiment.of(record, f"experiment-{i}", interactive=interactive) for i, record in enumerate(records, start=1)
    ]
    moving = any(experiment.specification is not None for experiment in experiments)
    return page(
        "experiments.html.j2",
        experiments=experiments,
        sentence=_sentence(records),
        can_draw=figure.can_draw(),
        bundle=pictures.bundle() if moving else None,
        plot_width=WIDTH,
        interval=_interval,
    )


def compact(record: ExperimentRecord) -> str:
    """Return an HTML fragment for a notebook: title, claims with verdicts, figure; text if jinja2 is missing."""
    try:
        return page(
            "experiment-compact.html.j2",
            record=record,
            verdicts=_verdicts([record]),
            still=pictures.still(record, _unlike_others(record)) if figure.can_draw() else None,
        )
    except MissingPackage:
        text_report = text.render(record, encoding="utf-8")
        return f"<pre>{html.escape(text_report)}</pre>"


def _unlike_others(record: ExperimentRecord) -> str:
    """Return an id that no other record has, because a notebook shows many records on one page."""
    key = record.key.encode(errors="backslashreplace")
    return f"bnlab-{hashlib.sha256(key).hexdigest()[:12]}"


def _sentence(records: Sequence[ExperimentRecord]) -> str:
    return f"{counted(len(records), 'experiment')}, {_verdicts(records)}"


def _verdicts(records: Sequence[ExperimentRecord]) -> str:
    """Return the number of claims and of each verdict, in words."""
    counts = Counter(claim.verdict for record in records for claim in record.claims)
    words = {
        Verdict.SUPPORTED: "supported",
        Verdict.REFUTED: "refuted",
        Verdict.DEPENDS: "depends" if counts[Verdict.DEPENDS] == 1 else "depend",
    }
    outcomes = ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict])
    claims = counted(counts.total(), "claim")
    return f"{claims}: {outcomes}" if outcomes else claims


def _interval(estimate: Estimate) -> str:
    """Return the interval: its two ends or, if four digits do not distinguish them, its half width."""
    if estimate.low == estimate.high:
        return ""
    low, high = f"{estimate.low:.4g}", f"{estimate.high:.4g}"
    return f"{low} to {high}" if low != high else f"\N{PLUS-MINUS SIGN} {(estimate.high - estimate.low) / 2:.2g}"


def _counts(claim: ClaimRecord) -> str:
    """Return under how many conditions the claim has each outcome, in words."""
    counts = Counter(estimate.outcome for estimate in claim.estimates)
    outcomes = [f"{outcome} under {counts[outcome]}" for outcome in OUTCOMES.values() if counts[outcome]]
    return f"{counted(len(claim.estimates), 'condition')}: {', '.join(outcomes)}"
