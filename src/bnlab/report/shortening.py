"""Prepares untrusted text for a report: removes control characters and shortens long text."""

from __future__ import annotations

import unicodedata

__all__ = ["ELLIPSIS", "beginning", "end", "plain"]

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
"""The mark that replaces text that was cut."""


def plain(text: str, unknown: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Return untrusted text without control, format and private characters, so no escape code reaches the terminal.

    Args:
        text: The text to show.
        unknown: Replacement for such a character.
    """
    return "".join(char if _is_shown(char) else unknown for char in text)


def beginning(text: str, limit: int, ellipsis: str = ELLIPSIS) -> str:
    """Return the first `limit` characters of a text, and an ellipsis if there are more."""
    return text if len(text) <= limit else text[:limit] + ellipsis


def end(text: str, limit: int, ellipsis: str = ELLIPSIS) -> str:
    """Return the last `limit` characters of a text, with an ellipsis before them if there are more."""
    return text if len(text) <= limit else ellipsis + text[-limit:]


def _is_shown(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")
