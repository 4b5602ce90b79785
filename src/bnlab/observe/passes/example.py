"""Takes one batch from what a caller passes as an example: a batch, or data of which the first batch is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.snapshot import random_numbers_kept
from bnlab.wording import error_line

__all__ = ["example_of"]


def example_of(example: Any, name: str = "example") -> Batch:  # noqa: ANN401 - a batch may be anything
    """Return one batch.

    Args:
        example: A batch, or data whose first batch is used. These are data: a loader or any other iterable that is not
            itself a form of batch; a function without arguments that returns one; and a list of which every item is a
            tuple, a list or a dict, that is, a batch. A tensor, an array, a tuple, a dict, an object with a method
            `to`, and any other list are batches, so that `[input, label]` and `(input, label)` are one batch.
        name: Name of the example in error messages.

    Returns:
        The batch. The same call with the result returns it again.

    Raises:
        UsageError: If the data hold no batch, or if reading them raises.
    """
    if isinstance(example, list):
        return _settled(example[0]) if _holds_batches(example) else example
    if _is_batch(example):
        return example
    try:
        with random_numbers_kept():  # starting a loader draws random numbers
            data = example() if callable(example) and not isinstance(example, Iterable) else example
            if _is_batch(data) or (isinstance(data, list) and not _holds_batches(data)):
                return data
            return _settled(next(iter(data)))
    except StopIteration:
        raise UsageError(f"{name}: data must hold at least one batch, got none.") from None
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{name}: data must yield batches, got {error_line(error)}") from error


def _is_batch(value: object) -> bool:
    """Return whether a value that is no list is a batch rather than data."""
    if value is None or isinstance(value, (Tensor, np.ndarray, tuple, Mapping, str, bytes)) or hasattr(value, "to"):
        return True
    return isinstance(value, nn.Module) or not (isinstance(value, Iterable) or callable(value))


def _holds_batches(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, (tuple, list, Mapping)) for item in items)


def _settled(batch: Batch) -> Batch:
    """Return a batch as a tuple if a second look would take it for data."""
    return tuple(batch) if isinstance(batch, list) and _holds_batches(batch) else batch
