"""Writes records as JSON and reads them back.

Numbers that JSON cannot represent become the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from typing_extensions import Self

from bnlab.errors import UsageError

__all__ = ["Document", "from_json", "json_schema", "to_json"]

_ADDED_LATER = frozenset(
    {
        *("calls", "inputs", "gap", "per_channel", "kind", "training"),
        *("statistics", "assumption", "failure", "history", "train_running", "train_recalibrated", "lower_is_better"),
        *("measurements", "recheck", "planned", "target"),
        *("conclusion_before", "conclusion_after", "numbers_before", "numbers_after", "gaps"),
    }
)
"""Keys that older JSON texts do not have, because they were added later."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict = 3, 100, 100, 50, 5
"""Shows values in errors, however large they are."""

_LONGEST_KEY = 100
"""Number of characters of a key that an error shows."""

_FILES = {
    "bnlab.diagnosis/1": "diagnosis-1.json",
    "bnlab.receipt/1": "receipt-1.json",
    "bnlab.experiment/1": "experiment-1.json",
}

Record = TypeVar("Record")


class Document:
    """A record with a schema of its own, the top level of a JSON text."""

    schema: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: dicts, lists, strings, finite numbers, booleans and None only."""
        value: dict[str, Any] = to_json(self)
        return value

    def dumps(self, *, indent: int | None = None) -> str:
        """Return the JSON text, on one line if `indent` is None."""
        return json.dumps(self.to_json(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the record from its JSON form.

        Raises:
            UsageError: If `data` does not name the schema of this record, or breaks it.
        """
        schema = data.get("schema")
        if schema != cls.schema:
            what = cls.schema.removeprefix("bnlab.").partition("/")[0]
            raise UsageError(f"{what}: schema must be {cls.schema!r}, got {_SHORT.repr(schema)}.")
        return from_json(cls, data)


def to_json(value: object) -> Any:
    """Return the JSON form of a record, or of any value that a record may hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(item) for item in value]
    return value


def from_json(record: type[Record], data: object) -> Record:
    """Build a record of the class `record` from its JSON form.

    Raises:
        UsageError: If a key is missing or unknown, or a value does not have the type that the record declares.
    """
    value: Record = _decode(record, data, record.__name__)
    return value


def json_schema(schema: str = "bnlab.diagnosis/1") -> dict[str, Any]:
    """Return a published JSON Schema: that of ``bnlab.diagnosis/1``, ``bnlab.receipt/1`` or ``bnlab.experiment/1``.

    Raises:
        UsageError: If `schema` is none of these.
    """
    if schema not in _FILES:
        raise UsageError(f"json_schema: schema must be one of {', '.join(_FILES)}, got {schema!r}.")
    text = resources.files("bnlab").joinpath(f"schemas/{_FILES[schema]}").read_text(encoding="utf-8")
    json_form: dict[str, Any] = json.loads(text)
    return json_form


@cache
def _field_types(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _decode(kind: Any, data: object, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_record(typing.cast("type", kind), data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        (kind,) = (option for option in arguments if option is not type(None))
        return _decode(kind, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is Mapping and isinstance(data, Mapping):
        return {key: _decode(arguments[1], item, f"{where}.{key[:_LONGEST_KEY]}") for key, item in data.items()}
    return _decode_scalar(kind, data, where)


def _decode_record(record: type, data: object, where: str) -> object:
    expected = _field_types(record)
    later = {
        f.name for f in dataclasses.fields(record) if f.name in _ADDED_LATER and f.default is not dataclasses.MISSING
    }
    if not isinstance(data, Mapping) or not set(expected) - later <= set(data) <= set(expected):
        got = _SHORT.repr(sorted(map(str, data))) if isinstance(data, Mapping) else type(data).__name__
        raise UsageError(f"{where}: keys must be {sorted(expected)}, got {got}.")
    return record(**{name: _decode(expected[name], data[name], f"{where}.{name}") for name in expected if name in data})


def _decode_scalar(kind: type, data: object, where: str) -> object:
    if kind is float and data in ("nan", "inf", "-inf"):
        return float(str(data))
    if kind in (int, float) and isinstance(data, (int, float)) and not isinstance(data, bool):
        _require_double(data, where)
        if kind is float:
            return float(data)
    if issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError:
            allowed = [member.value for member in kind]
            raise UsageError(f"{where}: value must be one of {allowed}, got {_SHORT.repr(data)}.") from None
    if type(data) is not kind:
        raise UsageError(f"{where}: value must be of type {kind.__name__}, got {_SHORT.repr(data)}.")
    return data


def _require_double(number: float, where: str) -> None:
    """Refuse a number beyond the doubles, and what parsers of JSON make of NaN, Infinity and 1e999.

    Raises:
        UsageError: If it is one.
    """
    if not abs(number) <= sys.float_info.max:
        got = "an integer beyond the doubles" if isinstance(number, int) else f"{number}"
        raise UsageError(f'{where}: value must be a finite number, or "nan", "inf" or "-inf", got {got}.')
