"""Counts the work on one file, and ends it where a file asks for more than any honest checkpoint does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from bnlab.errors import TooMuchWork

__all__ = ["LIMITS", "Budget"]

LIMITS: Mapping[str, int] = {
    "opcodes": 10_000_000,
    "objects": 4_000_000,
    "bytes of text and numbers": 128 << 20,
    "tensors": 1_000_000,
    "channels": 2 << 20,
}
"""The largest amount of each kind of work on one file. A checkpoint of 10,000 layers with its optimizer needs less."""

_SECONDS = 4.0
_WAY_OUT = "Save the state dict alone: torch.save(model.state_dict(), path)."


@dataclass
class Budget:
    """The work on one file so far.

    Attributes:
        limits: The largest amount of each kind of work; those of `LIMITS` unless a test sets smaller ones.
        seconds: The longest time of this thread on the processor for reading the structure of the file.
        way_out: What the user can do instead, as the last sentence of the message.
    """

    limits: Mapping[str, int] = field(default_factory=lambda: LIMITS)
    seconds: float = _SECONDS
    way_out: str = _WAY_OUT
    _spent: dict[str, int] = field(default_factory=dict)
    _start: float = field(default_factory=time.thread_time)

    def spend(self, kind: str, amount: int = 1) -> None:
        """Count an amount of work before it is done.

        Args:
            kind: A key of `limits`.
            amount: How much of it.

        Raises:
            TooMuchWork: If the whole work of this kind is above its limit.
        """
        spent = self._spent.get(kind, 0) + amount
        self._spent[kind] = spent
        if spent > self.limits[kind]:
            raise TooMuchWork(
                f"file must hold at most {self.limits[kind]:,} {kind} outside its tensors, got more. {self.way_out}"
            )

    def check_time(self) -> None:
        """End the work where it takes too long.

        Raises:
            TooMuchWork: If the time is over.
        """
        if time.thread_time() - self._start > self.seconds:
            raise TooMuchWork(f"file must be read in {self.seconds:g} s, got one that takes longer. {self.way_out}")
