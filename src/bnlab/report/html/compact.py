"""Renders a diagnosis or a receipt for a notebook: the top of its page, without scripts, in any theme."""

from __future__ import annotations

import html

from bnlab.errors import MissingPackage
from bnlab.records import Changes, DiagnosisRecord
from bnlab.report.html import causes as _causes
from bnlab.report.html import diagnosis as of_diagnosis
from bnlab.report.html import findings as _findings
from bnlab.report.html import receipt as of_receipt
from bnlab.report.html.environment import page
from bnlab.report.phrases import LEVEL_WORDS
from bnlab.report.problems import counts, problems_of
from bnlab.report.rows import metric_rows
from bnlab.report.text import diagnosis as text
from bnlab.report.text.receipt import render_changes

__all__ = ["diagnosis", "receipt"]

_MAX_GROUPS = 5
_MAX_KINDS = 8


def diagnosis(record: DiagnosisRecord) -> str:
    """Return an HTML fragment: conclusion, numbers, causes, network and worst problems; text if jinja2 is missing."""
    problems = problems_of(record)
    try:
        return page(
            "diagnosis-compact.html.j2",
            record=record,
            cards=metric_rows(record.numbers),
            slices=_causes.slices(record.causes),
            network=of_diagnosis.network_of(record),
            summary=counts(problems, separator=","),
            groups=_findings.groups(record, problems[:_MAX_GROUPS]),
            hidden=len(problems[_MAX_GROUPS:]),
            words=LEVEL_WORDS,
        )
    except MissingPackage:
        return f"<pre>{html.escape(text.render(record))}</pre>"


def receipt(changes: Changes) -> str:
    """Return an HTML fragment: the action, numbers and network before and after; text if jinja2 is missing."""
    text_report = render_changes(changes, encoding="utf-8")
    try:
        return page(
            "receipt-compact.html.j2",
            changes=changes,
            sentence=of_receipt.sentence(changes),
            pairs=of_receipt.number_pairs(changes),
            network=of_receipt.network_of(changes.recheck),
            lines=[line.strip() for line in text_report.splitlines()[1 : _MAX_KINDS + 1]],
        )
    except MissingPackage:
        return f"<pre>{html.escape(text_report)}</pre>"
