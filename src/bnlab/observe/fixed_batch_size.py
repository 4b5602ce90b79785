"""Leaves out the batches that a graph with a fixed batch size does not take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from bnlab.errors import UsageError
from bnlab.observe.inputs import Inputs
from bnlab.observe.passes.batches import samples_in
from bnlab.observe.passes.calling import Batch, run_batch
from bnlab.observe.passes.kept_batches import KeptBatches
from bnlab.wording import counted

__all__ = ["BatchesOfSize", "inputs_of_size"]


def inputs_of_size(inputs: Inputs, size: int | None) -> tuple[Inputs, tuple[str, ...]]:
    """Return inputs without the batches of another size than `size`, and notes on those that are left out.

    The inputs stay as they are if `size` is None, or with `forward`, which may cut batches itself.

    Raises:
        UsageError: If no batch of a data set has this size.
    """
    if size is None or inputs.forward is not run_batch or (inputs.data is None and inputs.train_data is None):
        return inputs, ()
    inputs = inputs.read()
    notes = []
    for name in ("data", "train_data"):
        data: KeptBatches | None = getattr(inputs, name)
        sizes = [] if data is None else [samples_in(batch) for batch in data.everything]
        other = {place for place, samples in enumerate(sizes) if samples != size}
        if data is None or not other:
            continue
        if len(other) == len(sizes):
            raise UsageError(_refusal(name, size, sizes[0]))
        inputs = replace(inputs, **{name: data.without(other)})  # type: ignore[arg-type]
        notes.append(f"{name}: {_left_out(len(other))}")
    return inputs, tuple(notes)


class BatchesOfSize:
    """The batches of a data set that have a number of samples. They can be iterated as often as the data.

    Args:
        data: Batches.
        size: The number of samples.
    """

    def __init__(self, data: Iterable[Batch], size: int) -> None:
        self._data, self._size = data, size
        self._other = 0

    @property
    def note(self) -> str | None:
        """What the last iteration left out; None if it was nothing."""
        return _left_out(self._other) if self._other else None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            UsageError: If there are batches, and none has this size.
        """
        self._other = 0
        last, any_fits = 0, False
        for batch in self._data:
            samples = samples_in(batch)
            if samples == self._size:
                any_fits = True
                yield batch
            else:
                self._other, last = self._other + 1, samples
        if self._other and not any_fits:
            raise UsageError(_refusal("batches", self._size, last))


def _left_out(count: int) -> str:
    return f"{counted(count, 'batch', 'batches')} of another size left out"


def _refusal(name: str, size: int, other: int) -> str:
    return (
        f"{name}: every batch must have {size} samples, the only number that the graph takes, got {other}. "
        "Pass batches of this size, or export the model with dynamic_shapes."
    )
