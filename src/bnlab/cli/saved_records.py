"""Reads records from files: the output of `--format json`, and the records of the lab."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bnlab.errors import BnlabError, UsageError
from bnlab.records import Changes, DiagnosisRecord, ExperimentRecord
from bnlab.records.json_file import as_record, read_values

__all__ = ["FolderRecords", "SavedRecord", "read_folder", "read_saved"]

SavedRecord = DiagnosisRecord | Changes | ExperimentRecord

_KINDS: tuple[type[SavedRecord], ...] = (
    DiagnosisRecord,
    Changes,
    ExperimentRecord,
)


@dataclass
class FolderRecords:
    """The experiment records of a folder.

    Attributes:
        records: The records in the order of the catalogue; experiments that it does not list come last, by name.
        passed_over: A reason for each file that is ignored: it holds something else, or a later record replaces it.
        errors: A message for each damaged file.
    """

    records: list[ExperimentRecord] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def read_saved(file: Path) -> list[SavedRecord]:
    """Return the records of a file: one JSON object, or JSON Lines.

    Raises:
        UnreadableFile: If the file cannot be read, or is not a regular file.
        DamagedFile: If the file is too large, is not JSON, or breaks the schema that it names.
        UsageError: If the file holds no record, or a record with a schema that this version does not know.
    """
    records = [_record(file, value) for value in read_values(file)]
    if not records:
        raise UsageError(f"{file}: file must hold a record, got none.")
    return records


def read_folder(folder: Path) -> FolderRecords:
    """Return the records in the JSON files of a folder.

    Raises:
        UsageError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise UsageError(f"--folder: folder must exist, got {folder}.")
    folder_records = FolderRecords()
    last: dict[object, tuple[Path, ExperimentRecord]] = {}
    for path in sorted(folder.glob("*.json"), key=_modification_order):
        for record in _experiments(path, folder_records):
            replaced = last.pop(_settings(record), None)
            if replaced is not None:
                folder_records.passed_over.append(f"{replaced[0]}: {path.name} has the same settings and is newer")
            last[_settings(record)] = (path, record)
    folder_records.records = _in_order(record for _, record in last.values())
    return folder_records


def _record(file: Path, value: object) -> SavedRecord:
    schema = value.get("schema") if isinstance(value, dict) else None
    known = {kind.schema: kind for kind in _KINDS}
    if not isinstance(value, dict) or not isinstance(schema, str) or schema not in known:
        rule = f"{file}: schema must be one of {', '.join(known)}, got {reprlib.repr(schema)}"
        newer = isinstance(schema, str) and schema.partition("/")[0] in {name.partition("/")[0] for name in known}
        raise UsageError(
            f"{rule}. Update bnlab: the file follows another version of the schema." if newer else f"{rule}."
        )
    return as_record(known[schema], value, file)


def _modification_order(path: Path) -> tuple[float, str]:
    """Return the sort key for the order of modification. A link that leads nowhere sorts first; reading it fails."""
    try:
        return path.stat().st_mtime, path.name
    except OSError:
        return 0.0, path.name


def _experiments(path: Path, folder_records: FolderRecords) -> list[ExperimentRecord]:
    try:
        saved = read_saved(path)
    except UsageError as error:
        folder_records.passed_over.append(str(error))
        return []
    except BnlabError as error:
        folder_records.errors.append(str(error))
        return []
    records = [record for record in saved if isinstance(record, ExperimentRecord)]
    if not records:
        folder_records.passed_over.append(
            f"{path}: schema must be {ExperimentRecord.schema!r}, got {saved[0].schema!r}"
        )
    return records


def _settings(record: ExperimentRecord) -> object:
    """Return what identifies a record: two records with the same settings differ at most in the code that ran."""
    return record.name, record.profile, tuple(sorted(record.config.items())), record.seeds


def _in_order(records: Iterable[ExperimentRecord]) -> list[ExperimentRecord]:
    from bnlab.lab import list as names

    places = {name: place for place, name in enumerate(names())}
    return sorted(records, key=lambda record: (places.get(record.name, len(places)), record.name, record.profile))
