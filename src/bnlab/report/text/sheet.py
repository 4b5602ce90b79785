"""The sheet that a report is written on: its width, and the characters that it can show."""

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
    """The sheet that a report is written on.

    Attributes:
        width: Width of the output, in columns.
        marks: The special characters that the output can show.
    """

    width: int
    marks: Marks = UNICODE

    @property
    def wide(self) -> bool:
        """Whether the sheet has room for whole messages beside layer names."""
        return self.width >= _WIDE

    @property
    def widest_name(self) -> int:
        """Largest width of a layer name, about a third of the sheet."""
        extra = max(0, self.width - _COMMON_WIDTH) // 3
        return min(_WIDEST_NAME, self.width * _WIDEST_NAME // _COMMON_WIDTH) + extra

    def plain(self, text: str) -> str:
        """Return untrusted text in characters that the sheet can show, shortened if it is very long."""
        return self.marks.plain(beginning(text, _LONGEST_TEXT, self.marks.ellipsis))

    def layer_name(self, name: str, room: int | None = None) -> Text:
        """Return a layer path that fits its column.

        Parts without a digit shrink to their first letter, from the front, because the digits distinguish the layers. A
        path that is still too long loses its beginning.

        Args:
            name: Layer path.
            room: Width of the column; None for the largest width of a name.
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
    """A report for a rich console, which is laid out when the width and encoding of the output are known."""

    draw: Callable[[Sheet], Iterable[RenderableType]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts of the report, as wide as the console."""
        yield from self.draw(Sheet(options.max_width, Marks.of(console.encoding)))


def write(report: RenderableType, *, width: int, encoding: str | None = None) -> str:
    """Return a report as plain text, without spaces at the ends of lines.

    Args:
        report: A report for a rich console.
        width: Largest width of a line, in columns.
        encoding: Encoding that the text must fit; None for the encoding of standard output.
    """
    output_encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    file = io.TextIOWrapper(io.BytesIO(), encoding=output_encoding, write_through=True)
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(report)
    text = file.buffer.getvalue().decode(output_encoding)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _initialled(parts: list[str], widest: int) -> str:
    """Return a path in which just enough leading parts are shortened to initials to fit."""
    for index, part in enumerate(parts[:-1]):
        if cell_len(".".join(parts)) <= widest:
            break
        if part and not any(map(str.isdigit, part)):
            parts[index] = part[0]
    return ".".join(parts)
