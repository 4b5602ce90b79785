"""Interrupts a command behind its change: tests that use timers meet this moment once in a thousand runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from unittest import mock

from bnlab.observe.passes.snapshot import all_or_nothing

_end = all_or_nothing._end


class Moments:
    """The moments from the end of the outermost block of `all_or_nothing` to the return of a command.

    Python looks for signals when a function begins, when a call has returned, and in loops, in which functions are
    called too. A function that profiles runs at the same moments, and what it raises comes from the same place.

    Attributes:
        count: How many moments there are.
    """

    def __init__(self, command: Callable[[Any], object], new: Callable[[], object]) -> None:
        """Run the command twice, and count.

        Args:
            command: A function that calls the command, and nothing else.
            new: Makes the argument of `command`, a new one for each run.
        """
        self._command = command
        self._at, self._last_end = 0, sys.maxsize
        self.interrupt(new(), 0)
        self._last_end = self._ends
        self.interrupt(new(), 0)

    def interrupt(self, argument: object, at: int) -> Any:
        """Run the command, send SIGALRM at a moment, counted from 1, and return what the command returns."""
        self.count, self._at, self._ends = 0, at, 0

        def end(block: all_or_nothing, way_back: Callable[[], None] | None) -> None:
            self._ends += 1
            if self._ends == self._last_end:
                sys.setprofile(self._profile)
            _end(block, way_back)

        with mock.patch.object(all_or_nothing, "_end", end):
            try:
                return self._command(argument)
            finally:
                sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_back is not None and frame.f_back.f_code is self._command.__code__:
            sys.setprofile(None)  # the command has returned
        elif event != "c_call" and frame.f_code.co_name != "<genexpr>":  # what one raises when it is dropped is lost
            self.count += 1
            if self.count == self._at:
                signal.raise_signal(signal.SIGALRM)
