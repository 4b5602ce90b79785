"""Writes diagnoses as JSON: one indented object, or JSON Lines."""

from __future__ import annotations

from bnlab.records import DiagnosisRecord

__all__ = ["render", "render_line"]


def render(diagnosis: DiagnosisRecord) -> str:
    """Return one diagnosis as indented JSON, for a single target."""
    return diagnosis.dumps(indent=2)


def render_line(diagnosis: DiagnosisRecord) -> str:
    """Return one diagnosis on one line, for several targets."""
    return diagnosis.dumps()
