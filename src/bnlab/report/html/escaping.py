"""Formats names and numbers for a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from bnlab import wording
from bnlab.report.shortening import beginning, end, plain

__all__ = ["channels", "counted", "json_for_script", "layer_name", "number", "presentable"]

_LONGEST_TEXT = 2000
_LONGEST_NAME = 200
_MAX_CHANNELS = 6
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}"}


def presentable(text: str) -> str:
    """Return untrusted text without control characters, shortened if it is very long."""
    short = beginning(text, _LONGEST_TEXT)
    return short if short.isprintable() else plain(short)


def layer_name(name: str | None) -> str:
    """Return a layer path for a page; a very long path loses its beginning."""
    if name is None:
        return "the network"
    return presentable(end(name, _LONGEST_NAME)) or "(the module itself)"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number in few digits; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 layer" or "2,048 channels"."""
    return wording.counted(count, noun, separator=",")


def channels(indices: Sequence[int] | None, width: int) -> str:
    """Return the number of channels and the first few indices; "" if `indices` is None."""
    if indices is None:
        return ""
    if len(indices) == width:
        return f"all {width:,}"
    first = wording.abridged([str(index) for index in indices], _MAX_CHANNELS)
    return f"{len(indices):,} of {width:,}: {first}" if width else first


def json_for_script(value: object) -> str:
    """Return JSON for a script element; no character in it can end the element or begin markup."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
