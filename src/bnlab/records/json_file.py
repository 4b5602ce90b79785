"""Reads files of JSON or JSON Lines, which may come from strangers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bnlab.errors import DamagedFile, UsageError
from bnlab.records.document import Document
from bnlab.regular_file import read_whole
from bnlab.unique_keys import DuplicateKey, unique_keys

__all__ = ["as_record", "read_values"]

_MAX_BYTES = 1 << 27
"""The largest file: the values of every channel of a network with 600,000 channels take less."""

Record = TypeVar("Record", bound=Document)


def read_values(file: Path) -> Iterator[object]:
    """Yield the values in a file: one JSON text, or one in each line.

    Raises:
        UnreadableFile: If the file cannot be read, or is not a regular file.
        DamagedFile: If the file is too large, or a text is not JSON, names a key of an object twice, is nested too
            deeply, or has an integer of thousands of digits.
    """
    data = read_whole(file, _MAX_BYTES)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedFile(f"{file}: file must be JSON, got bytes that are not UTF-8 text.") from None
    if not text.strip():
        return
    try:
        whole = _parsed(text)
    except ValueError as error:
        del text
        yield from _values_of_lines(file, data, error)
    else:
        yield whole


def as_record(kind: type[Record], value: Mapping[str, Any], file: Path) -> Record:
    """Return the record that a value of a file holds.

    Raises:
        DamagedFile: If the value breaks the schema of the record.
    """
    try:
        return kind.from_json(value)
    except UsageError as error:
        raise DamagedFile(f"{file}: record must follow {kind.schema}, got: {error}") from None


def _values_of_lines(file: Path, data: bytes, whole: ValueError) -> Iterator[object]:
    """Yield the value of each line, of which a file has more than one if it is not JSON as a whole."""
    lines = ((number, line) for number, line in enumerate(io.BytesIO(data), start=1) if line.strip())
    is_first = True
    for number, line in lines:
        try:
            value = _parsed(line.decode("utf-8"))
        except ValueError as error:
            reason = whole if is_first else f"{error} (line {number} of the file)"
            raise DamagedFile(f"{file}: file must be JSON or JSON Lines, got {reason}.") from None
        is_first = False
        yield value


def _parsed(text: str) -> object:
    """Return the value of a JSON text.

    Raises:
        ValueError: If the text is no such value; the message is the end of a sentence.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error).lower()) from None
    except DuplicateKey:
        raise
    except ValueError:  # Python's limit, which ends work that grows with the square of the digits
        raise ValueError("an integer of thousands of digits") from None
