"""Where results go: stdout, or a file that appears whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.atomic_file import write_whole
from bnlab.errors import UsageError

if TYPE_CHECKING:
    from bnlab.records import Changes

__all__ = [
    "Drawing",
    "Format",
    "PageFormat",
    "check_output",
    "complain",
    "emit",
    "require_pages",
    "show_receipt",
    "write_output",
]


class Format(str, Enum):
    """How a result is written."""

    TEXT = "text"
    JSON = "json"


class PageFormat(str, Enum):
    """How a result is written that also has a page to look at."""

    TEXT = "text"
    JSON = "json"
    HTML = "html"


class Drawing(str, Enum):
    """How a saved record is drawn."""

    TEXT = "text"
    HTML = "html"


def check_output(output: Path, inputs: Iterable[str]) -> None:
    """Refuse an output path that is one of the inputs, or lies nowhere, before any work is done.

    Raises:
        UsageError: If it does.
    """
    if not os.path.isdir(output.resolve().parent) or os.path.isdir(output):  # noqa: PTH112 - these never raise
        raise UsageError(f"--output: path must be a file in an existing folder, got {output}.")
    for path in inputs:
        if os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):  # noqa: PTH110, PTH121
            raise UsageError(f"--output: path must not be an input, got {output}.")


def complain(message: str) -> None:
    """Write an error to stderr, on one line and without what could reach the terminal as a command."""
    from bnlab.report.shortening import plain

    print(f"error: {plain(message)}", file=sys.stderr)


def require_pages() -> None:
    """Refuse to go on without what pages are made with, before any work is done.

    Raises:
        UsageError: If it is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError(
            "--format: jinja2 must be installed for html, got none. Install it: pip install 'bnlab[report]'."
        )


def show_receipt(changes: Changes, notes: Iterable[str] = ()) -> None:
    """Print a receipt, as wide as the terminal or one line a fact in a pipe, and notes behind it."""
    from rich.console import Console
    from rich.text import Text

    from bnlab.report.shortening import plain
    from bnlab.report.text.receipt import render_changes, renderable

    console = Console(highlight=False)
    if not console.is_terminal:
        print("\n".join([render_changes(changes), *map(plain, notes)]))
        return
    console.print(renderable(changes))
    for note in notes:
        console.print(Text(plain(note)))


def emit(text: str, output: Path | None) -> None:
    """Write text to a file, or to stdout where there is none."""
    if output is None:
        print(text, end="")
    else:
        write_output(text.encode(errors="backslashreplace"), output)


def write_output(data: bytes, output: Path) -> None:
    """Write the file that --output names, whole or not at all.

    Raises:
        UnwritableFile: If it cannot be written.
    """
    write_whole(data, output, option="--output")
