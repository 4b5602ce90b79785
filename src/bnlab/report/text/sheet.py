"""What a report is written on: how wide it is, and which characters it can show."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from bnlab.report.shortening import beginning
from bnlab.report.text.bars import UNICODE, Marks

__all__ = ["Report", "Sheet", "write"]

_COMMON_WIDTH = 80
_WIDE = 140
_WIDEST_NAME = 28
_LONGEST_NAME = 200
_LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Sheet:
    """What a report is written on.

    Attributes:
        width: Columns of the terminal.
        marks: The characters it can show.
    """

    width: int
    marks: Marks = UNICODE

    @property
    def wide(self) -> bool:
        """Whether there is room for whole messages beside layer names."""
        return self.width >= _WIDE

    @property
    def widest_name(self) -> int:
        """Most columns of a layer name: about a third of the sheet."""
        extra = max(0, self.width - _COMMON_WIDTH) // 3
        return min(_WIDEST_NAME, self.width * _WIDEST_NAME // _COMMON_WIDTH) + extra

    def plain(self, text: str) -> str:
        """Return untrusted text as the sheet can show it, and no more of it than anyone reads."""
        return self.marks.plain(beginning(text, _LONGEST_TEXT, self.marks.ellipsis))

    def layer_name(self, name: str, room: int | None = None) -> Text:
        """Return a layer path that fits its column.

        Parts without a digit shrink to their first letter, the first ones first: the digits tell the layers apart. What
        is still too long loses its beginning.

        Args:
            name: Layer path.
            room: Columns there are; as many as a name has at most if None.
        """
        widest = self.widest_name if room is None else min(room, self.widest_name)
        short = self.plain(name[-_LONGEST_NAME:]) or "(the module itself)"
        if len(name) <= _LONGEST_NAME:
            short = _initialled(short.split("."), widest)
        if cell_len(short) <= widest and len(name) <= _LONGEST_NAME:
            return Text(short)
        left = max(1, widest - cell_len(self.marks.ellipsis))
        while cell_len(short) > left:
            short = short[max(1, (cell_len(short) - left) // 2) :]
        return Text(self.marks.ellipsis + short)


@dataclass(frozen=True)
class Report:
    """A report for a rich console, laid out when the width and the characters of the output are known."""

    draw: Callable[[Sheet], Iterable[RenderableType]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts of the report, as wide as the console."""
        yield from self.draw(Sheet(options.max_width, Marks.of(console.encoding)))


def write(report: RenderableType, *, width: int, encoding: str | None = None) -> str:
    """Return a report as plain text, line by line without spaces at the end.

    Args:
        report: For a rich console.
        width: Columns no line is wider than.
        encoding: What the text is for; None for standard output.
    """
    wanted = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    file = io.TextIOWrapper(io.BytesIO(), encoding=wanted, write_through=True)
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(report)
    text = file.buffer.getvalue().decode(wanted)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _initialled(parts: list[str], widest: int) -> str:
    """Return a path whose first parts are initials, as many as it takes to fit."""
    for index, part in enumerate(parts[:-1]):
        if cell_len(".".join(parts)) <= widest:
            break
        if part and not any(map(str.isdigit, part)):
            parts[index] = part[0]
    return ".".join(parts)
