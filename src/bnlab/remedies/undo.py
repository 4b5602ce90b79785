"""The way back from several changes: all of it or none of it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from torch import nn
from typing_extensions import Self

from bnlab.errors import UsageError

__all__ = ["UndoStack"]


class UndoStack:
    """Takes changes back in reverse order. As a context manager it does so if the block raises."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._touched: list[nn.Module] = []
        self._left: list[tuple[object, ...]] = []

    def push(self, module: nn.Module, undo: Callable[[], None]) -> None:
        """Add what takes the last change, one to `module`, back."""
        self._steps.append(undo)
        self._touched.append(module)

    def seal(self) -> None:
        """Note how the changed modules are left, to be sure later that nobody built on them."""
        self._left = [_fingerprint(module) for module in self._touched]

    def take_back(self) -> None:
        """Undo every change.

        Raises:
            UsageError: If a module was changed again since; then nothing is undone.
        """
        for module, left in zip(self._touched, self._left, strict=True):
            if _fingerprint(module) != left:
                raise UsageError(
                    f"undo: every module must be as it was left, got a {type(module).__name__} that was changed since. "
                    f"Undo what was done later first."
                )
        self._unwind()

    def _unwind(self) -> None:
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._unwind()


def _fingerprint(module: nn.Module) -> tuple[object, ...]:
    own = vars(module)
    noted = ("activation", "takes_residual", "frozen_from")
    return type(module), tuple(module._parameters), *(own.get(key) for key in noted)  # noqa: SLF001
