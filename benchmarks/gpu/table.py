"""Tables that print each row as soon as it is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Output"]


class Output:
    """Prints titles, rows and lines at once, in columns of fixed widths.

    Args:
        is_dry: Whether this is a dry run. Then no figure is shown.
    """

    def __init__(self, *, is_dry: bool) -> None:
        self._is_dry = is_dry
        self._columns: Sequence[tuple[str, int]] = ()

    def open(self, title: str, columns: Sequence[tuple[str, int]]) -> None:
        """Begin a table. A column has a name and a width: below 0 for text on the left."""
        self._columns = columns
        self.line(f"\n{title}")
        self.row([name for name, _ in columns])

    def row(self, cells: Sequence[str]) -> None:
        """Print a row of the open table."""
        padded = (
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, (_, width) in zip(cells, self._columns, strict=True)
        )
        self.line("  ".join(padded).rstrip())

    def line(self, text: str) -> None:
        """Print a line at once, also into a pipe."""
        print(text, flush=True)

    def figure(self, value: float | None, digits: int) -> str:
        """Return the text of a measured number: "-" for one that is missing."""
        if value is None or math.isnan(value):
            return "-"
        return "dry" if self._is_dry else f"{value:.{digits}f}"

    def figures(self, values: Sequence[float | None], digits: int) -> str:
        """Return the text of numbers side by side, such as forward / forward and backward."""
        return " / ".join(self.figure(value, digits) for value in values)
