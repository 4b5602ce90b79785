"""`bnlab explain` says what a check looks for and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["command"]


def command(
    code: Annotated[str | None, typer.Argument(help="Code of a check; without it all checks are listed.")] = None,
) -> None:
    """Explain a check, or list all checks."""
    from rich.console import Console
    from rich.markdown import Markdown

    from bnlab.checks import explain

    console = Console()
    if code is None:
        _list(console)
    elif console.is_terminal:
        console.print(Markdown(explain(code)))
    else:
        print(explain(code), end="")


def _list(console: Console) -> None:
    from rich.table import Table

    from bnlab.checks import EVERY_CHECK

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for header in ("code", "level", "name", "what it looks for"):
        table.add_column(header)
    for check in EVERY_CHECK:
        table.add_row(check.code, check.group.level.value, check.name, check.title)
    console.print(table)
