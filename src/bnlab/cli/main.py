"""The `bnlab` command."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TextIO

import typer
import typer.core

from bnlab._version import __version__
from bnlab.cli import bench, check, demo, explain, fold, lab, pool, repair, report
from bnlab.cli.output import print_error, print_notice
from bnlab.cli.stopping import Stopped, leave, stops_on_signals
from bnlab.cli.unexpected import show_traceback, unexpected_line
from bnlab.errors import BnlabError, BnlabWarning
from bnlab.wording import did_you_mean, reason_of

__all__ = ["app", "main"]

_WRONG_CHOICE = re.compile(r"'(?P<value>.*)' is not one of (?P<choices>'.*')")
"""The message of typer and click for a value that an option does not take."""


_RUNS_SCRIPTS = "bench"
"""The command whose scripts may end it with exit codes of their own."""


class _ForMain(Exception):
    """Carries an error through typer, which would end the program with exit code 1: that of findings."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Commands(typer.core.TyperGroup):
    """The commands, which suggest the value that a user may have meant where an option takes one of a few."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would end with exit code 1
            raise _ForMain(error) from error
        except (EOFError, OSError, SystemExit) as error:
            if isinstance(error, (BnlabError, Stopped)) or ctx.invoked_subcommand == _RUNS_SCRIPTS:
                raise
            raise _ForMain(error) from error
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
app.command("pool")(pool.command)
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
    """Run the command line. Any error becomes one line on stderr and exit code 2.

    The environment variable BNLAB_TRACEBACK shows where an error comes from. SIGTERM and SIGHUP end the command as an
    error does. A signal that the caller ignores stays ignored, as by nohup, and as Ctrl-C in a job in the background.
    """
    _behave_in_pipes()
    try:
        with stops_on_signals():
            message = _run()
    except KeyboardInterrupt:
        print_notice("bnlab: interrupted")
        sys.exit(130)
    except Stopped as stopped:
        leave(stopped)
    _fail(message)  # here the error and what it keeps in memory are gone


def _run() -> str:
    """Run the command, and return what to tell the user if it fails."""
    try:
        try:
            with _warnings_on_one_line():
                app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except Exception as error:
        cause = error.error if isinstance(error, _ForMain) else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        return _message(cause)
    return ""  # not reached: typer ends with SystemExit


def _message(error: BaseException) -> str:
    if isinstance(error, BnlabError):
        show_traceback(error)
        return str(error)
    if isinstance(error, OSError) and error.filename is None:
        _drop_output()
        show_traceback(error)
        return f"output must be writable, got: {reason_of(error)}."
    return unexpected_line(error)


def _drop_output() -> None:
    """Send the rest of what stdout keeps to nowhere, so that Python does not fail again when it ends."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def _fail(message: str) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may be full or closed, too
        print_error(message)
    sys.exit(2)
