"""Turns errors that nobody foresaw into one line, so that exit code 1 always means findings and never a crash."""

from __future__ import annotations

import os
import traceback

from bnlab.wording import error_line

__all__ = ["show_traceback", "unexpected_line"]

_VARIABLE = "BNLAB_TRACEBACK"


def unexpected_line(error: BaseException, subject: str = "bnlab") -> str:
    """Return the message for an error that is not a `BnlabError`, and show its traceback where the user wants it.

    Args:
        error: The error.
        subject: What the message is about: the command, or the name of one target.
    """
    show_traceback(error)
    if isinstance(error, MemoryError):
        return f"{subject}: memory must suffice, got a MemoryError. Run the command where there is more of it."
    return (
        f"{subject}: command must end without an unexpected error, got {_line(error)}. "
        f"Set {_VARIABLE}=1 to see where it comes from."
    )


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an error on stderr if the environment variable BNLAB_TRACEBACK is set."""
    if os.environ.get(_VARIABLE):
        traceback.print_exception(error)


def _line(error: BaseException) -> str:
    try:
        return error_line(error).rstrip(".")
    except Exception:  # the class of the error may be of the user, with a text that raises
        return type(error).__name__
