"""Decides when a pass has read enough batches for a standard error."""

from __future__ import annotations

import math

__all__ = ["Looks"]

_MIN_BATCHES = 8
"""Number of batches below which the spread of the batch statistics is too uncertain to stop the pass."""

_PART = 16
"""One in this many of the batches so far, at least, is read before the next look."""


class Looks:
    """The batches after which a pass looks at the standard error that it has reached.

    Who looks after every batch stops when chance makes the standard error small. Three rules keep such luck from
    mattering: the standard error contains Student's factor for few batches; no pass stops before the eighth; and a look
    comes after as many batches as the last one showed to be missing. These are at most as many as there are, and at
    least a sixteenth of them.

    Args:
        standard_error: The largest one that is small enough, in standard deviations.
    """

    def __init__(self, standard_error: float) -> None:
        self._wanted = standard_error
        self._next = _MIN_BATCHES

    def is_due(self, index: int) -> bool:
        """Return whether the pass looks after so many batches."""
        return index >= self._next

    def may_stop(self, index: int, batches: int, standard_error: float) -> bool:
        """Return whether the standard error is small enough; if the pass goes on, the next look is due later.

        Args:
            index: Number of batches so far.
            batches: Number of those that were not left out.
            standard_error: What they reach; inf where it is not known.
        """
        missing = _MIN_BATCHES - batches
        if missing <= 0:
            factor = min((standard_error / self._wanted) ** 2, 2.0)
            missing = max(math.ceil((factor - 1) * batches), math.ceil(batches / _PART))
        self._next = index + missing
        return batches >= _MIN_BATCHES and standard_error <= self._wanted
