"""What a notebook shows of a diagnosis and of a receipt: the top of their pages, without scripts, in any theme."""

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
from bnlab.report.rows import metric_rows
from bnlab.report.text import diagnosis as text
from bnlab.report.text.receipt import render_changes

__all__ = ["diagnosis", "receipt"]

_MOST_GROUPS = 5
_MOST_KINDS = 8


def diagnosis(record: DiagnosisRecord) -> str:
    """Return a fragment: conclusion, numbers, causes, the network, the worst findings; text without jinja2."""
    groups = _findings.groups(record, record.findings)
    try:
        return page(
            "diagnosis-compact.html.j2",
            record=record,
            cards=metric_rows(record.numbers),
            slices=_causes.slices(record.causes),
            network=of_diagnosis.network_of(record),
            groups=groups[:_MOST_GROUPS],
            hidden=len(groups[_MOST_GROUPS:]),
            words=LEVEL_WORDS,
        )
    except MissingPackage:
        return f"<pre>{html.escape(text.render(record))}</pre>"


def receipt(changes: Changes) -> str:
    """Return a fragment: what was done, the numbers and the network before and after; text without jinja2."""
    told = render_changes(changes, encoding="utf-8")
    try:
        return page(
            "receipt-compact.html.j2",
            changes=changes,
            sentence=of_receipt.sentence(changes),
            pairs=of_receipt.number_pairs(changes),
            network=of_receipt.network_of(changes.recheck),
            lines=[line.strip() for line in told.splitlines()[1 : _MOST_KINDS + 1]],
        )
    except MissingPackage:
        return f"<pre>{html.escape(told)}</pre>"
