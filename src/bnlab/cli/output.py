"""Writes results to stdout, or to a file that is written completely or not at all."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.atomic_file import require_writable, write_whole
from bnlab.errors import UsageError

if TYPE_CHECKING:
    from bnlab.records import Changes

__all__ = [
    "Drawing",
    "Format",
    "PageFormat",
    "check_output",
    "print_error",
    "print_notice",
    "prints_on_stderr",
    "require_pages",
    "show_receipt",
    "write_output",
    "write_text",
]


class Format(str, Enum):
    """The formats of a result."""

    TEXT = "text"
    JSON = "json"


class PageFormat(str, Enum):
    """The formats of a result that can also be an HTML page."""

    TEXT = "text"
    JSON = "json"
    HTML = "html"


class Drawing(str, Enum):
    """The formats in which a saved record is drawn."""

    TEXT = "text"
    HTML = "html"


def check_output(output: Path, inputs: Iterable[str]) -> None:
    """Refuse an output path that is one of the inputs or has no folder, before any work is done.

    Raises:
        UsageError: If the path is an input or a folder, or its folder does not exist.
        UnwritableFile: If the path is a read-only file, or cannot be the path of a file.
    """
    if os.path.isdir(output) or not os.path.isdir(output.parent):  # noqa: PTH112 - these never raise
        raise UsageError(f"--output: path must be a file in an existing folder, got {output}.")
    require_writable(output, option="--output")
    for path in inputs:
        if os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):  # noqa: PTH110, PTH121
            raise UsageError(f"--output: path must not be an input, got {output}.")


def print_error(message: str) -> None:
    """Write an error to stderr, as `print_notice` does."""
    print_notice(f"error: {message}")


def print_notice(message: str) -> None:
    """Write a message to stderr on one line, without the control characters that a terminal would obey."""
    from bnlab.report.shortening import plain

    print(plain(message), file=sys.stderr)


def prints_on_stderr() -> AbstractContextManager[object]:
    """Return a block in which the code of the user prints on stderr, because stdout holds the result of the command."""
    return redirect_stdout(sys.stderr)


def require_pages() -> None:
    """Refuse to continue without jinja2, which renders the pages, before any work is done.

    Raises:
        UsageError: If jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError(
            "--format: jinja2 must be installed for html, got none. Install it: pip install 'bnlab[report]'."
        )


def show_receipt(changes: Changes, notes: Iterable[str] = ()) -> None:
    """Print a receipt and then the notes. Lines are as wide as the terminal; in a pipe each fact is one line."""
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


def write_text(text: str, output: Path | None) -> None:
    """Write text to a file, or to stdout if `output` is None."""
    if output is None:
        print(text, end="")
    else:
        write_output(text.encode(errors="backslashreplace"), output)


def write_output(data: bytes, output: Path) -> None:
    """Write the file that --output names, completely or not at all. See `write_whole`.

    Raises:
        UnwritableFile: If the file cannot be written.
    """
    write_whole(data, output, option="--output")
