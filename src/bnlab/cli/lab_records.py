"""Every record of an experiment in a folder, in the order of the catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bnlab.cli.saved import read_saved
from bnlab.errors import BnlabError, UsageError
from bnlab.records import ExperimentRecord

__all__ = ["Found", "read_folder"]


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        records: In the order of the catalogue; experiments it does not know are last, by name.
        passed_over: Why files were left out that hold something else, or what a later record replaces.
        errors: What is wrong with damaged files.
    """

    records: list[ExperimentRecord] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def read_folder(folder: Path) -> Found:
    """Return the records in the JSON files of a folder.

    Raises:
        UsageError: If there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"--folder: folder must exist, got {folder}.")
    found = Found()
    last: dict[object, tuple[Path, ExperimentRecord]] = {}
    for path in sorted(folder.glob("*.json"), key=_written):
        for record in _experiments(path, found):
            replaced = last.pop(_settings(record), None)
            if replaced is not None:
                found.passed_over.append(f"{replaced[0]}: {path.name} has the same settings and is newer")
            last[_settings(record)] = (path, record)
    found.records = _in_order(record for _, record in last.values())
    return found


def _written(path: Path) -> tuple[float, str]:
    """Return what puts files in the order they were written in; a link that leads nowhere is reported on reading."""
    return (path.stat().st_mtime if path.exists() else 0.0, path.name)


def _experiments(path: Path, found: Found) -> list[ExperimentRecord]:
    try:
        saved = read_saved(path)
    except UsageError as error:
        found.passed_over.append(str(error))
        return []
    except BnlabError as error:
        found.errors.append(str(error))
        return []
    records = [record for record in saved if isinstance(record, ExperimentRecord)]
    if not records:
        found.passed_over.append(f"{path}: schema must be {ExperimentRecord.schema!r}, got {saved[0].schema!r}")
    return records


def _settings(record: ExperimentRecord) -> object:
    """Return what tells records apart that are not runs of the same with other code."""
    return record.name, record.profile, tuple(sorted(record.config.items())), record.seeds


def _in_order(records: Iterable[ExperimentRecord]) -> list[ExperimentRecord]:
    from bnlab.lab import list as names

    places = {name: place for place, name in enumerate(names())}
    return sorted(records, key=lambda record: (places.get(record.name, len(places)), record.name, record.profile))
