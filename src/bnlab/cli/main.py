"""The `bnlab` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bnlab._version import __version__
from bnlab.cli import bench, check, demo, explain
from bnlab.errors import BnlabError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check")(check.command)
app.command("explain")(explain.command)
app.command("bench")(bench.command)
app.command("demo")(demo.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bnlab {__version__}")
        raise typer.Exit


@app.callback()
def _bnlab(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, explain and fix what batch normalization does to a PyTorch model."""


def main() -> None:
    """Run the command line: an error meant for the user is one line on stderr and exit code 2."""
    try:
        app()
    except BnlabError as err:
        from bnlab.report.text import plain

        print(f"error: {plain(str(err))}", file=sys.stderr)
        sys.exit(2)
