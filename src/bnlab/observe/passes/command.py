"""Takes back what a command changed if it does not return, because an interrupt may come behind the change too.

`all_or_nothing` restores a model while its block runs. Between the end of this block and the return of the command lie
the making of the receipt and the ends of the contexts around the block. What raises there reaches a caller who has no
receipt, so that the model must be as before.

A block may lie in contexts that put other modules or tensors in the place of those of the model until they end. For
that reason the values are those from the beginning of the block, and the structure is that from the beginning of the
command.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

from bnlab.errors import BnlabWarning
from bnlab.uninterrupted import SignalsHeld, finishes
from bnlab.wording import error_line

__all__ = ["Block", "Command", "add_way_back", "raising_only_if_nothing_else_does"]


class _Thread(threading.local):
    """What runs in a thread: the innermost command, and the number of blocks that change a model."""

    command: Command | None = None
    blocks = 0


_thread = _Thread()


class Command(AbstractContextManager[None]):
    """A block in which a command runs. If it raises, the ways back of what the command has changed are taken.

    Behind the block, `take_back` takes them too. The function that is the command calls it in an `except` that reaches
    up to its `return`. So no moment is left in which the command raises and leaves a change.

    Attributes:
        restore_settings: Restores the settings of torch whenever the command raises: an interrupt may come when
            `torch.no_grad` has changed one and its block has not begun.
        restore_structure: Restores everything but values as it was when the command began, before the ways back.
    """

    def __init__(self) -> None:
        self.restore_settings: Callable[[], None] = _nothing
        self.restore_structure: Callable[[], None] = _nothing
        self._signals = SignalsHeld()
        self._outer: Command | None = None
        self._has_begun = False
        self._ways_back: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        try:
            self._signals.__enter__()
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @finishes
    def _begin(self) -> None:
        self._outer, _thread.command = _thread.command, self
        self._has_begun = True

    @finishes
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._has_begun:
                self._has_begun, _thread.command = False, self._outer
            if kind is not None:
                self._take_ways_back(error)
            elif self._outer is not None:
                self._outer.add([self._restore] if self._ways_back else [])
        finally:
            self._signals.__exit__(kind, error, trace)

    def add(self, ways_back: list[Callable[[], None]]) -> None:
        """Add functions that take changes back. The latest one runs first."""
        self._ways_back += ways_back

    def take_back(self) -> None:
        """Take back what the command has changed, while an exception is handled. A second call does nothing."""
        with SignalsHeld():
            self._take_ways_back(sys.exc_info()[1])

    @finishes
    def _take_ways_back(self, error: BaseException | None) -> None:
        with raising_only_if_nothing_else_does(error), ExitStack() as restoring:
            restoring.callback(self._restore)
            restoring.callback(self.restore_settings)

    def _restore(self) -> None:
        ways_back, self._ways_back = self._ways_back, []
        if ways_back:
            with ExitStack() as restoring:
                for way_back in ways_back:
                    restoring.callback(way_back)
                restoring.callback(self.restore_structure)


class Block:
    """A block that changes a model. One within another one needs no way back: that of the outer one serves both."""

    _has_begun = False

    @finishes
    def begin(self) -> None:
        """Begin the block."""
        _thread.blocks += 1
        self._has_begun = True

    @finishes
    def end(self, way_back: Callable[[], None] | None = None) -> None:
        """End the block, if it has begun.

        Args:
            way_back: Takes the change back; None if nothing has changed.
        """
        if self._has_begun:
            self._has_begun = False
            _thread.blocks -= 1
            if way_back is not None and not _thread.blocks:
                add_way_back(way_back)


def add_way_back(way_back: Callable[[], None]) -> None:
    """Add a function that runs if the current command does not return. Outside of a command this does nothing."""
    if _thread.command is not None:
        _thread.command.add([way_back])


@contextmanager
def raising_only_if_nothing_else_does(error: BaseException | None) -> Iterator[None]:
    """Let a failure of the restoration raise only where nothing else does: an interrupt must stay an interrupt."""
    try:
        yield
    except Exception as failure:
        if error is None:
            raise
        warnings.warn(f"the model could not be restored whole: {error_line(failure)}", BnlabWarning, stacklevel=2)


def _nothing() -> None:
    pass
