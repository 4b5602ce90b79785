"""Undoes several changes together: all of them or none."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bnlab.errors import UsageError

__all__ = ["UndoStack"]


class UndoStack:
    """A stack of changes that are undone in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._modules: list[nn.Module] = []
        self._fingerprints: list[tuple[object, ...]] = []

    def push(self, module: nn.Module, undo: Callable[[], None]) -> None:
        """Add the function that undoes the latest change, which was made to `module`."""
        self._steps.append(undo)
        self._modules.append(module)

    def seal(self) -> None:
        """Record the state of the changed modules, to detect later changes to them."""
        self._fingerprints = [_fingerprint(module) for module in self._modules]

    def take_back(self) -> None:
        """Undo every change. If the model is restored because a step raises, this can be repeated.

        Raises:
            UsageError: If a module was changed after :meth:`seal`. Nothing is undone then.
        """
        for module, fingerprint in zip(self._modules, self._fingerprints, strict=True):
            if _fingerprint(module) != fingerprint:
                raise UsageError(
                    f"undo: every module must be unchanged, got a {type(module).__name__} that was changed later. "
                    f"Undo the later changes first."
                )
        for step in reversed(self._steps):
            step()


def _fingerprint(module: nn.Module) -> tuple[object, ...]:
    own = vars(module)
    attributes = ("activation", "takes_residual", "frozen_from")
    return type(module), tuple(module._parameters), *(own.get(key) for key in attributes)  # noqa: SLF001
