"""Records in files: what `--format json` printed, and what the lab keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bnlab.errors import DamagedFile, UnreadableFile, UsageError
from bnlab.records import Changes, DiagnosisRecord, ExperimentRecord

__all__ = ["SavedRecord", "read_saved"]

SavedRecord = DiagnosisRecord | Changes | ExperimentRecord

_KINDS: tuple[type[SavedRecord], ...] = (
    DiagnosisRecord,
    Changes,
    ExperimentRecord,
)


def read_saved(file: Path) -> list[SavedRecord]:
    """Return the records of a file: one JSON object, or JSON Lines.

    Raises:
        UnreadableFile: If it cannot be read.
        DamagedFile: If it is not JSON, or breaks the schema it says it follows.
        UsageError: If it holds no record, or one of a schema this version does not know.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DamagedFile(f"{file}: file must be JSON, got bytes that are no text.") from None
    except OSError as error:
        raise UnreadableFile(f"{file}: file must be readable, got: {(error.strerror or str(error)).lower()}.") from None
    values = _values(file, text)
    if not values:
        raise UsageError(f"{file}: file must hold a record, got none.")
    return [_record(file, value) for value in values]


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
        raise UsageError(f"{rule}. Update bnlab: the file is of another version." if newer else f"{rule}.")
    try:
        return known[schema].from_json(value)
    except UsageError as error:
        raise DamagedFile(f"{file}: record must follow {schema}, got: {error}") from None
