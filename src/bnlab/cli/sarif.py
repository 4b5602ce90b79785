"""What a SARIF log needs beside diagnoses: the texts of the checks, and where a model is written."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bnlab.checks import CHECKS
from bnlab.cli.specs import imported
from bnlab.cli.targets import is_model_spec
from bnlab.records import DiagnosisRecord
from bnlab.report.sarif import RuleText, Source

__all__ = ["rules", "sources"]


def rules() -> Mapping[str, RuleText]:
    """Return the name, the one line and the page of every check, by code."""
    return {check.code: RuleText(check.name, check.title, check.page, check.group.level) for check in CHECKS}


def sources(diagnoses: Iterable[DiagnosisRecord]) -> Mapping[str, Source]:
    """Return file and line of the callables that built a model, by the name of the target."""
    found = {}
    for diagnosis in diagnoses:
        name = diagnosis.target.name
        source = _source(name) if is_model_spec(name) else None
        if source is not None:
            found[name] = source
    return found


def _source(spec: str) -> Source | None:
    """Return where a callable is written; None where Python does not know, as for one made in C."""
    try:
        target = inspect.unwrap(imported(spec, call=False))
        file = inspect.getsourcefile(target)
        line = inspect.getsourcelines(target)[1]
    except (TypeError, OSError):
        return None
    if file is None:
        return None
    path = Path(file).resolve()
    relative = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Source(os.fspath(relative), max(line, 1))
