"""Untrusted text as a report shows it: without control characters, and no more of it than anyone reads."""

from __future__ import annotations

import unicodedata

__all__ = ["ELLIPSIS", "beginning", "end", "plain"]

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
"""Where text was cut."""


def plain(text: str, unknown: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Return untrusted text without control, format and private characters: no escape reaches the terminal.

    Args:
        text: To show.
        unknown: In place of such a character.
    """
    return "".join(char if _is_shown(char) else unknown for char in text)


def beginning(text: str, limit: int, ellipsis: str = ELLIPSIS) -> str:
    """Return the first `limit` characters of a text, and an ellipsis where there are more."""
    return text if len(text) <= limit else text[:limit] + ellipsis


def end(text: str, limit: int, ellipsis: str = ELLIPSIS) -> str:
    """Return the last `limit` characters of a text: of a layer path, they tell it apart."""
    return text if len(text) <= limit else ellipsis + text[-limit:]


def _is_shown(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")
