"""Reads records from files: the output of `--format json`, and the records of the lab."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnlab.errors import BnlabError, DamagedFile, UnreadableFile, UsageError
from bnlab.records import Changes, DiagnosisRecord, ExperimentRecord

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
        UnreadableFile: If the file cannot be read.
        DamagedFile: If the file is not JSON, or breaks the schema that it names.
        UsageError: If the file holds no record, or a record with a schema that this version does not know.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DamagedFile(f"{file}: file must be JSON, got bytes that are not UTF-8 text.") from None
    except OSError as error:
        raise UnreadableFile(f"{file}: file must be readable, got: {(error.strerror or str(error)).lower()}.") from None
    values = _values(file, text)
    if not values:
        raise UsageError(f"{file}: file must hold a record, got none.")
    return [_record(file, value) for value in values]


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


def _values(file: Path, text: str) -> list[Any]:
    try:
        return [json.loads(text)] if text.strip() else []
    except (ValueError, RecursionError) as whole:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            if len(lines) > 1:
                return [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            pass
        raise DamagedFile(f"{file}: file must be JSON or JSON Lines, got {str(whole).lower()}.") from None


def _record(file: Path, value: object) -> SavedRecord:
    schema = value.get("schema") if isinstance(value, dict) else None
    known = {kind.schema: kind for kind in _KINDS}
    if not isinstance(value, dict) or not isinstance(schema, str) or schema not in known:
        rule = f"{file}: schema must be one of {', '.join(known)}, got {schema!r}"
        newer = isinstance(schema, str) and schema.partition("/")[0] in {name.partition("/")[0] for name in known}
        raise UsageError(
            f"{rule}. Update bnlab: the file follows another version of the schema." if newer else f"{rule}."
        )
    try:
        return known[schema].from_json(value)
    except UsageError as error:
        raise DamagedFile(f"{file}: record must follow {schema}, got: {error}") from None


def _modification_order(path: Path) -> tuple[float, str]:
    """Return the sort key for the order of modification. A dangling link sorts first; reading it reports the error."""
    return (path.stat().st_mtime if path.exists() else 0.0, path.name)


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
