"""Why a remedy leaves something as it is: one class for every reason, wherever it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["Refusal", "attempted"]

Result = TypeVar("Result")


class Refusal(Exception):
    """Why a remedy does nothing about a layer, a module or a node of a graph: a phrase without a final stop.

    Code that looks for a reason raises it; a plan that goes on with the next layer returns it in place of a result.
    """

    @property
    def reason(self) -> str:
        """The phrase, which goes into a receipt."""
        return str(self)


def attempted(attempt: Callable[[], Result]) -> Result | Refusal:
    """Return what an attempt returns, or the refusal it raises."""
    try:
        return attempt()
    except Refusal as refusal:
        return refusal
