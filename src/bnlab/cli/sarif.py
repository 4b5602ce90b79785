"""Adds to a SARIF log what diagnoses do not hold: the texts of the checks, and the source lines of models."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bnlab.checks import EVERY_CHECK
from bnlab.cli.importing import import_spec
from bnlab.cli.targets import is_model_spec
from bnlab.records import DiagnosisRecord
from bnlab.report.sarif import RuleText, Source

__all__ = ["rules", "sources"]


def rules() -> Mapping[str, RuleText]:
    """Return the name, title, page and level of every check, by code."""
    return {check.code: RuleText(check.name, check.title, check.page, check.group.level) for check in EVERY_CHECK}


def sources(diagnoses: Iterable[DiagnosisRecord]) -> Mapping[str, Source]:
    """Return the file and line of each callable that builds a model, by the name of the target."""
    sources_by_target = {}
    for diagnosis in diagnoses:
        name = diagnosis.target.name
        source = _source(name) if is_model_spec(name) else None
        if source is not None:
            sources_by_target[name] = source
    return sources_by_target


def _source(spec: str) -> Source | None:
    """Return the file and line of a callable; None if Python does not know them, for example for a C function."""
    try:
        target = inspect.unwrap(import_spec(spec, call=False))
        file = inspect.getsourcefile(target)
        line = inspect.getsourcelines(target)[1]
    except (TypeError, OSError):
        return None
    if file is None:
        return None
    path = Path(file).resolve()
    relative = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Source(os.fspath(relative), max(line, 1))
