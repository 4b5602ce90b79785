"""The forms that batches and data may have, and how a model is called on one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError

__all__ = [
    "Forward",
    "Without",
    "batches_of",
    "dealt",
    "first_samples",
    "moved",
    "require_data",
    "run_batch",
    "samples_in",
    "tensors_in",
]

Forward = Callable[[nn.Module, Any], Any]
"""Calls a model on one batch."""


_MOST_DEALT = 12
"""Batches that are held at once to deal their samples out again."""


def run_batch(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - a batch may be anything
    """Call a model on one batch: a tensor, a tuple or list (input first), or a dict (passed as keywords)."""
    found = _input(batch)
    return model(**found) if isinstance(found, Mapping) else model(found)


def _input(batch: Any) -> Any:  # noqa: ANN401
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def samples_in(batch: Any) -> int:  # noqa: ANN401
    """Return the number of samples in a batch: the first dimension of its first tensor; 0 if it has none."""
    sizes = [tensor.size(0) for tensor in tensors_in(_input(batch)) if tensor.dim()]
    return sizes[0] if sizes else 0


def first_samples(batch: Any, count: int) -> Any:  # noqa: ANN401
    """Return the first samples of a batch: every tensor whose first dimension is the number of samples is cut."""
    size = samples_in(batch)
    return moved(batch, lambda tensor: tensor[:count] if tensor.dim() and tensor.size(0) == size else tensor)


class Without:
    """Data without some of its batches, which can be run through again."""

    def __init__(self, data: Iterable[Any], left_out: Collection[int]) -> None:
        self._data = data
        self._left_out = left_out

    def __len__(self) -> int:
        """Return the number of batches, if the data knows its own."""
        return len(self._data) - len(self._left_out)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return what the data itself offers, such as the `dataset` of a loader."""
        return getattr(self._data, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield the other batches."""
        return (batch for index, batch in enumerate(self._data) if index not in self._left_out)


def dealt(data: Iterable[Any], batches: int) -> list[Any]:
    """Return some batches of a data set, spread over it, with their samples dealt among them at random.

    Args:
        data: Batches.
        batches: How many there are.

    Returns:
        Up to `_MOST_DEALT` batches; none if they cannot be mixed, for their tensors have other shapes.
    """
    step = max(1, -(-batches // _MOST_DEALT))
    kept = [batch for index, batch in enumerate(data) if index % step == 0]
    sizes = [samples_in(batch) for batch in kept]
    total = sum(sizes)
    if len(kept) < 2 or min(sizes) < 1:
        return []
    order = torch.split(torch.randperm(total, generator=torch.Generator().manual_seed(0)), sizes)
    columns = [[t for t in tensors_in(_input(batch)) if t.dim()] for batch in kept]
    mixed: list[Tensor] = []
    for column in zip(*columns, strict=False):
        together = [t.size(0) for t in column] == sizes and len({(t.shape[1:], t.dtype) for t in column}) == 1
        if not together:
            return []
        mixed.append(torch.cat(list(column)))
    dealt_out = [
        _with_tensors(_input(batch), [m[part] for m in mixed]) for batch, part in zip(kept, order, strict=True)
    ]
    return [(item,) if isinstance(batch, (tuple, list)) else item for item, batch in zip(dealt_out, kept, strict=True)]


def _with_tensors(item: Any, tensors: list[Tensor]) -> Any:  # noqa: ANN401
    waiting = iter(tensors)
    return moved(item, lambda tensor: next(waiting) if tensor.dim() else tensor)


def require_data(name: str, data: object) -> None:
    """Refuse what cannot be run through twice.

    Raises:
        UsageError: If `data` is a one-shot iterator, a single tensor, or no iterable at all.
    """
    if isinstance(data, Tensor):
        raise UsageError(f"{name}: it must be an iterable of batches, got one tensor. Wrap it: [tensor].")
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise UsageError(f"{name}: it must be an iterable of batches, got {type(data).__name__}.")
    if isinstance(data, Iterator):
        raise UsageError(
            f"{name}: it must be an iterable that can be run through again, got a one-shot {type(data).__name__}, "
            f"whose second pass would be empty. Give list({name}) or the loader itself."
        )


def batches_of(data: Iterable[Any], like: nn.Module) -> Iterator[Any]:
    """Yield every batch on the device of a model."""
    device = next((tensor.device for tensor in (*like.parameters(), *like.buffers())), None)
    for batch in data:
        yield batch if device is None else moved(batch, lambda tensor: tensor.to(device))


def moved(item: Any, function: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, Mapping):
        return {key: moved(part, function) for key, part in item.items()}
    if isinstance(item, (tuple, list)):
        parts = [moved(part, function) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    return item


def tensors_in(value: Any) -> list[Tensor]:  # noqa: ANN401
    """Return every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list, set)):
        return [tensor for item in value for tensor in tensors_in(item)]
    is_record = hasattr(value, "__dataclass_fields__") and not isinstance(value, type)
    return [tensor for item in vars(value).values() for tensor in tensors_in(item)] if is_record else []
