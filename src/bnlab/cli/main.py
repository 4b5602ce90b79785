"""The `bnlab` command."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
import typer.core

from bnlab._version import __version__
from bnlab.cli import bench, check, demo, explain, fold, lab, repair, report
from bnlab.cli.output import print_error, print_notice
from bnlab.errors import BnlabError, BnlabWarning
from bnlab.wording import did_you_mean

__all__ = ["app", "main"]

_WRONG_CHOICE = re.compile(r"'(?P<value>.*)' is not one of (?P<choices>'.*')")
"""The message of typer and click for a value that an option does not take."""


class _Commands(typer.core.TyperGroup):
    """The commands, which suggest the value that a user may have meant where an option takes one of a few."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = getattr(error, "message", None)  # each version of typer has its own class for a wrong value
            wrong = _WRONG_CHOICE.search(message) if isinstance(message, str) else None
            if wrong is not None:
                names = re.findall("'([^']*)'", wrong["choices"])
                error.message = f"{message}{did_you_mean(wrong['value'], names)}"  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check")(check.command)
app.command("repair")(repair.command)
app.command("fold")(fold.command)
app.command("report")(report.command)
app.command("explain")(explain.command)
app.add_typer(lab.app, name="lab")
app.command("bench", context_settings={"ignore_unknown_options": True})(bench.command)
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
    """Run the command line. An error that is meant for the user becomes one line on stderr and exit code 2."""
    _behave_in_pipes()
    try:
        try:
            with _warnings_on_one_line():
                app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BnlabError as err:
        _fail(str(err))
    except OSError as err:
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop the rest of its buffer
        _fail(f"output must be writable, got: {(err.strerror or str(err)).lower()}.")


def _behave_in_pipes() -> None:
    """End without a message when the reader of a pipe closes it, and escape characters that stdout cannot encode."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Show the warnings of bnlab without the file and the source line that issued them."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_on_one_line(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, BnlabWarning):
                print_notice(f"warning: {message}")
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_on_one_line
        yield


def _fail(message: str) -> None:
    print_error(message)
    sys.exit(2)
