"""The receipt that every action returns: the model, the changes, and a way to undo them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn

from bnlab.observe.passes.command import add_way_back
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.records import Changes
from bnlab.report.text.receipt import render_changes

__all__ = ["Receipt"]


def _model_to_undo(receipt: Receipt) -> nn.Module | None:
    return None if receipt._undo is None else receipt.model  # noqa: SLF001 - of the class below


class Receipt:
    """A record of what an action did to a model, with a way to undo it.

    Attributes:
        model: The model as it is now.
        changes: The record of the changes, with a JSON form (schema ``bnlab.receipt/1``).
    """

    def __init__(self, model: nn.Module, changes: Changes, undo: Callable[[], None]) -> None:
        self.model = model
        self.changes = changes
        self._undo: Callable[[], None] | None = undo

    @one_at_a_time("undo", of=_model_to_undo)
    def undo(self) -> nn.Module:
        """Undo the changes and return the model. A second call does nothing.

        Raises:
            UsageError: If something changed the same parts of the model later. Nothing is undone then.
        """
        undo = self._undo
        if undo is not None:
            with _protected(self.model):
                undo()
            add_way_back(partial(setattr, self, "_undo", undo))
            self._undo = None
        return self.model

    def __str__(self) -> str:
        """Return the text form, with one line per kind of change."""
        return render_changes(self.changes)

    def __repr__(self) -> str:
        """Return a summary in one line."""
        layers = len({change.layer for change in self.changes.changes})
        return f"<Receipt: {self.changes.action}, layers changed: {layers}>"

    def _repr_html_(self) -> str:
        """Return a compact view for a notebook: the changes, and the gap between the modes before and after them."""
        from bnlab.report.html import compact

        return compact.receipt(self.changes)


def _protected(model: object) -> AbstractContextManager[None]:
    """Return a block that undoes all or nothing. A program has the protection of its graph."""
    return all_or_nothing(model) if isinstance(model, nn.Module) else nullcontext()
