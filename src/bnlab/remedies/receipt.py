"""What an action hands back: the model, what changed, and the way back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bnlab.records import Changes
from bnlab.report.text.receipt import render_changes

__all__ = ["Receipt"]


class Receipt:
    """What an action did to a model.

    Attributes:
        model: The model as it is now.
        changes: The record of it, with a JSON form (schema ``bnlab.receipt/1``).
    """

    def __init__(self, model: nn.Module, changes: Changes, undo: Callable[[], None]) -> None:
        self.model = model
        self.changes = changes
        self._undo: Callable[[], None] | None = undo

    def undo(self) -> nn.Module:
        """Take the changes back and return the model; a second time nothing happens.

        Raises:
            UsageError: If what was changed was changed again since; then nothing happens either.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None
        return self.model

    def __str__(self) -> str:
        """Return the text form, one kind of change a line."""
        return render_changes(self.changes)

    def __repr__(self) -> str:
        """Return one line."""
        layers = len({change.layer for change in self.changes.changes})
        return f"<Receipt: {self.changes.action}, layers changed: {layers}>"

    def _repr_html_(self) -> str:
        """Return a compact view for a notebook: what changed, and the gap between the modes before and after."""
        from bnlab.report.html import compact

        return compact.receipt(self.changes)
