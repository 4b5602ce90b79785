"""Bars and marks in the characters that an output can show: block elements if possible, else ASCII."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnlab.report.shortening import ELLIPSIS, plain

__all__ = ["ASCII", "UNICODE", "Marks"]


@dataclass(frozen=True)
class Marks:
    """The special characters of a report.

    Attributes:
        encoding: Encoding of the output.
        ellipsis: Replacement for text that was cut.
        unknown: Replacement for a control character.
        full: One cell of a bar.
        parts: Partial last cells of a bar, smallest first; one entry if a bar has whole cells only.
        negative: One cell of the bar of a negative value.
    """

    encoding: str
    ellipsis: str
    unknown: str
    full: str
    parts: str
    negative: str

    @staticmethod
    def of(encoding: str) -> Marks:
        """Return the marks for an encoding: block elements if it can encode all of them, else ASCII."""
        unicode = UNICODE
        marks = unicode.ellipsis + unicode.unknown + unicode.full + unicode.parts + unicode.negative
        try:
            marks.encode(encoding)
        except (LookupError, UnicodeEncodeError):
            return Marks(encoding, ASCII.ellipsis, ASCII.unknown, ASCII.full, ASCII.parts, ASCII.negative)
        return unicode

    def plain(self, text: str) -> str:
        """Return untrusted text without control characters, in characters that the output can show."""
        return self.encodable(plain(text, self.unknown))

    def encodable(self, text: str) -> str:
        r"""Return text in which characters that the output cannot show are escaped as \xe9, \u5c42 or \U0001f600."""
        try:
            return text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        except LookupError:
            return text.encode("ascii", "backslashreplace").decode("ascii")

    def bar(self, value: float, *, largest: float, cells: int) -> str:
        """Return a bar that is `cells` long for the largest value. A value other than 0 has at least a partial cell.

        A value that is not finite has no bar.
        """
        if not (math.isfinite(value) and math.isfinite(largest)) or value == 0 or largest <= 0:
            return ""
        length = min(abs(value) / largest, 1.0) * cells
        if value < 0:
            return self.negative * max(1, round(length))
        steps = len(self.parts) + 1 if len(self.parts) > 1 else 1
        whole, rest = divmod(round(length * steps), steps)
        end = self.parts[rest - 1] if rest else ""
        return self.full * whole + end or self.parts[0]


UNICODE = Marks("utf-8", ELLIPSIS, "\N{REPLACEMENT CHARACTER}", "█", "▏▎▍▌▋▊▉", "░")
ASCII = Marks("ascii", "...", "?", "#", ".", "-")
