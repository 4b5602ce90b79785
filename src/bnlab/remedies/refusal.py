"""The exception that states why a remedy leaves a layer, a module or a node alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["Refusal", "attempted"]

Result = TypeVar("Result")


class Refusal(Exception):
    """The reason why a remedy leaves a layer, a module or a node of a graph alone, as a phrase without a final stop.

    Code that detects the reason raises a refusal. A plan that continues with the next layer returns it as a result.
    """

    @property
    def reason(self) -> str:
        """The reason as text, for a receipt."""
        return str(self)


def attempted(attempt: Callable[[], Result]) -> Result | Refusal:
    """Call a function and return its result, or the refusal that it raises.

    A refusal that is kept as a result has no traceback: with its frames it would keep all they hold, such as weights.
    """
    try:
        return attempt()
    except Refusal as refusal:
        return refusal.with_traceback(None)
