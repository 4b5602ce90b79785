"""Runs a model and restores it completely afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from bnlab.errors import BatchMisfit, BnlabError, UsageError
from bnlab.observe.passes.calling import Batch, Forward, inputs_taken, run_batch
from bnlab.observe.passes.snapshot import Snapshot, Untouched
from bnlab.wording import error_line

__all__ = ["ForwardFailed", "Subject", "untouched", "usage_error_unless"]


class ForwardFailed(UsageError):
    """A forward raised, or gave nothing that can be measured."""


class Subject:
    """A model under observation, with a snapshot that is taken once and can be restored any number of times.

    Args:
        model: Any module.
        forward: Calls the model on a batch.
    """

    def __init__(self, model: nn.Module, forward: Forward = run_batch) -> None:
        self.model, self.forward = model, forward
        self._snapshot = Snapshot(model)

    def run(self, batch: Batch) -> Any:  # noqa: ANN401 - a model may return anything
        """Call the model on one batch, which must be on its device."""
        return self.forward(self.model, batch)

    def inputs_taken(self, data: Iterable[Batch]) -> int:
        """Return the number of elements of each batch that are input, as far as the first batch shows it; else 0."""
        return next((inputs_taken(self.model, batch, self.forward) for batch in data), 0)

    def untouched(self) -> AbstractContextManager[None]:
        """Restore the model and every random number generator when the block ends, also when it raises.

        The model returns to the state of the snapshot: its modes, submodules, hooks, requires_grad flags and gradients.
        Buffers are the same tensors as before and get their values back. Random numbers and the settings of torch
        continue as if the block had not run (`Untouched`). Other attributes are restored by reference, so a list to
        which forward appends keeps the new items. Parameters are restored by reference too: a parameter whose `data`
        forward replaces gets its own data back, but changes in place remain.
        """
        return Untouched(self._snapshot)

    def with_hooks(
        self, modules: Collection[nn.Module], register: Callable[[nn.Module], RemovableHandle]
    ) -> AbstractContextManager[None]:
        """Register a hook on some modules for the duration of a block, in which it is part of the snapshot."""
        return self._snapshot.with_hooks(modules, register)


def untouched(model: nn.Module) -> AbstractContextManager[None]:
    """Restore a model when the block ends, with a snapshot for this block alone."""
    return Untouched(Snapshot(model))


@contextmanager
def usage_error_unless(rule: str, kind: type[UsageError] = UsageError) -> Iterator[None]:
    """Turn any exception that a model raises into a UsageError, or a kind of it, of one line.

    Errors of that kind stay as they are, and so does the error for a batch that does not fit. Other errors of bnlab
    count as those of the model for :class:`ForwardFailed` alone, because the layers of bnlab raise them too.
    """
    try:
        yield
    except (kind, BatchMisfit):
        raise
    except BnlabError as error:
        if kind is UsageError:
            raise
        raise kind(f"model: {rule}, got {type(error).__name__}: {str(error).rstrip('.')}") from error
    except Exception as error:
        if "not supported on ScriptModules" in str(error):
            raise kind(
                "model: its layers must take hooks to be measured, got a TorchScript module. "
                "Pass the model that was scripted."
            ) from error
        raise kind(f"model: {rule}, got {error_line(error)}") from error
