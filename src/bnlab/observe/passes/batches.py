"""The forms that batches and data may have, and how a model is called on one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count, islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bnlab.errors import BnlabError, BnlabWarning, UsageError

__all__ = [
    "MOST_KEPT",
    "Batch",
    "Forward",
    "KeptBatches",
    "MaxBatches",
    "batches_of",
    "first_samples",
    "keep",
    "map_tensors",
    "require_data",
    "require_max_batches",
    "run_batch",
    "samples_in",
    "shuffled_batches",
    "tensors_in",
]

Batch: TypeAlias = Any
"""A tensor, a tuple or list (input first), a dict, or whatever a model takes."""

Forward = Callable[[nn.Module, Batch], Any]
"""Calls a model on one batch."""

MaxBatches: TypeAlias = int | Literal["auto"] | None
"""How many batches of a data set are used: at most so many, all of them, or at most `MOST_KEPT`."""

MOST_KEPT = 64
"""Batches that are held in memory at most, so that what needs several passes reads the data once."""

_MOST_DEALT = 12
"""Batches that are held at once to deal their samples out again."""


def run_batch(model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401 - a batch may be anything
    """Call a model on one batch: a tensor, a tuple or list (input first), or a dict (passed as keywords)."""
    found = _input(batch)
    return model(**found) if isinstance(found, Mapping) else model(found)


def _input(batch: Batch) -> Batch:
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def samples_in(batch: Batch) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor; 0 if it has none."""
    sizes = [tensor.size(0) for tensor in tensors_in(_input(batch)) if tensor.dim()]
    return sizes[0] if sizes else 0


def first_samples(batch: Batch, count: int) -> Batch:
    """Return the first samples of a batch: every tensor whose first dimension is the number of samples is cut."""
    size = samples_in(batch)
    return map_tensors(batch, lambda tensor: tensor[:count] if tensor.dim() and tensor.size(0) == size else tensor)


class _Without:
    """Data without some of its batches, which can be run through again."""

    def __init__(self, data: Iterable[Batch], left_out: Collection[int]) -> None:
        self._data, self._left_out = data, left_out

    def __iter__(self) -> Iterator[Batch]:
        return (batch for index, batch in enumerate(self._data) if index not in self._left_out)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return what the data itself offers."""
        if name.startswith("_"):  # also of an object that is being copied, which has no data yet
            raise AttributeError(f"{name!r} is not known of data without some batches")
        return getattr(self._data, name)


class KeptBatches(Sequence[Batch]):
    """Batches of a data set that are held in memory, so that the data are read once.

    Args:
        batches: What is held, by its place in the data.
        data: What they come from. Where all of it is held, attributes that a list has not, such as the `dataset` of a
            loader, are those of it.
        total: How many batches the data has; None where that is not known.
        uses_all: Whether every batch of the data is to be used, where it can be run through once more.
        left_out: Places in the data of batches that are not to be used.
    """

    def __init__(
        self,
        batches: Mapping[int, Batch],
        data: Iterable[Batch],
        total: int | None,
        *,
        uses_all: bool,
        left_out: Collection[int] = (),
    ) -> None:
        self._all = batches
        self._batches = {place: batch for place, batch in batches.items() if place not in left_out}
        self._held = list(self._batches.values())
        self._data, self._total, self._uses_all, self._left_out = data, total, uses_all, left_out
        self._is_whole = total == len(batches)

    def __len__(self) -> int:
        """Return the number of batches that are held."""
        return len(self._held)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - an int or a slice, as of a list
        """Return a copy of a batch that is held, which the caller may change; a list of them for a slice."""
        held = self._held[index]
        return [_copied(batch) for batch in held] if isinstance(index, slice) else _copied(held)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return what the data itself offers, where all of it is held: a part has another size than its `dataset`."""
        if name.startswith("_") or not self.is_whole:
            raise AttributeError(f"{name!r} is not known of a part of the data")
        return getattr(self._data, name)

    @property
    def is_whole(self) -> bool:
        """Whether every batch of the data is held."""
        return self._is_whole and not self._left_out

    @property
    def source(self) -> Iterable[Batch]:
        """The data they come from, without the batches that are left out."""
        return _Without(self._data, self._left_out) if self._left_out else self._data

    @property
    def everything(self) -> Iterable[Batch]:
        """Every batch that is to be used: the data itself where that is more than what is held."""
        if self._is_whole or not self._uses_all:
            return self
        return self.source

    def without(self, left_out: Collection[int]) -> KeptBatches:
        """Return the data without some batches, by their places in :attr:`everything`."""
        if self._is_whole or not self._uses_all:
            places: Iterable[int] = self._batches
        else:
            places = (place for place in count() if place not in self._left_out)
        wanted = max(left_out, default=-1) + 1
        gone = {place for index, place in enumerate(islice(places, wanted)) if index in left_out}
        return KeptBatches(
            self._all, self._data, self._total, uses_all=self._uses_all, left_out={*self._left_out, *gone}
        )

    def described(self) -> str | None:
        """Return "64 of 1,563 batches"; None where every batch is used."""
        if self._uses_all or self._is_whole:
            return None
        if self._total is None:
            return f"the first {len(self):,} batches"
        return f"{len(self):,} of {self._total:,} batches"


def keep(name: str, data: Iterable[Batch], max_batches: MaxBatches) -> KeptBatches:
    """Read a data set once, and hold the batches that are wanted, or up to `MOST_KEPT` of them.

    Where there are more batches than are wanted, those are spread evenly over data that knows its length, and are the
    first of data that does not.

    Args:
        name: What errors call the data.
        data: Batches; what is kept already is returned as it is.
        max_batches: How many to use and hold; None for all, of which `MOST_KEPT` are held; "auto" for all, or for
            `MOST_KEPT` where there are more.

    Raises:
        UsageError: If there is no batch, or reading them raises.
    """
    if isinstance(data, KeptBatches):
        return data
    total = _length(data)
    max_kept = MOST_KEPT if max_batches is None or max_batches == "auto" else max_batches
    wanted = None if total is None or total <= max_kept else {step * total // max_kept for step in range(max_kept)}
    try:
        kept, count, has_ended = _picked(data, max_kept, wanted)
    except BnlabError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{name}: it must yield batches, got {type(error).__name__}: {text[:300]}") from error
    if has_ended:
        total = count  # which a length may have promised otherwise
    elif wanted is None:
        total = None
    if not kept:
        raise UsageError(f"{name}: it must hold at least one batch, got none.")
    if total is None and max_batches == "auto":
        warnings.warn(
            f"{name}: it must know its length for {max_kept} of its batches to be spread over it, got none: the first "
            f"{max_kept} are used. Give max_batches=None to use all, or a number.",
            BnlabWarning,
            stacklevel=2,
        )
    return KeptBatches(kept, data, total, uses_all=max_batches is None)


def _picked(data: Iterable[Batch], max_kept: int, wanted: Collection[int] | None) -> tuple[dict[int, Batch], int, bool]:
    """Read the wanted batches, or the first ones; return them, how many were read, and whether the data ended.

    Batches are copied: a loader may fill the same memory again. Where data promise more batches than they have, and
    there are few, all are kept.
    """
    first: dict[int, Batch] = {}
    spread: dict[int, Batch] = {}
    place = 0
    for batch in data:
        if wanted is None and place == max_kept:
            return first, place, False
        copied = _copied(batch) if place < max_kept or (wanted is not None and place in wanted) else None
        if place < max_kept:
            first[place] = copied
        if wanted is not None and place in wanted:
            spread[place] = copied
            if len(spread) == len(wanted):
                return spread, place + 1, False
        place += 1
    return (first if place <= max_kept else spread), place, True


def _copied(item: Batch) -> Batch:
    """Return a batch in containers and tensors of its own, of the same types."""
    return map_tensors(item, torch.clone, _of_same_type)


def _of_same_type(item: Mapping[Any, Any], parts: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(item) is dict:
        return parts
    if not isinstance(item, MutableMapping):
        return item
    other = copy.copy(item)
    other.update(parts)
    return other


def _length(data: Iterable[Batch]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except Exception:  # a loader of a stream has __len__, which raises
        return None


def require_max_batches(value: MaxBatches) -> MaxBatches:
    """Return how many batches to use, if it is "auto", None or a number of at least 1.

    Raises:
        UsageError: If it is something else.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (is_count or value is None or value == "auto"):
        raise UsageError(f"max_batches: value must be 'auto', None or a number of at least 1, got {value!r}.")
    return value


def shuffled_batches(data: Sequence[Batch]) -> list[Batch]:
    """Return some batches of a data set, spread over it, with their samples dealt among them at random.

    Returns:
        Up to `_MOST_DEALT` batches; none if they cannot be mixed, for their tensors have other shapes.
    """
    kept = list(data[:: max(1, -(-len(data) // _MOST_DEALT))])
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
    shuffled = [_with_tensors(_input(batch), [m[part] for m in mixed]) for batch, part in zip(kept, order, strict=True)]
    return [(item,) if isinstance(batch, (tuple, list)) else item for item, batch in zip(shuffled, kept, strict=True)]


def _with_tensors(item: Any, tensors: list[Tensor]) -> Any:  # noqa: ANN401
    waiting = iter(tensors)
    return map_tensors(item, lambda tensor: next(waiting) if tensor.dim() else tensor)


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
        yield batch if device is None else map_tensors(batch, lambda tensor: tensor.to(device))


def map_tensors(
    item: Any,  # noqa: ANN401
    function: Callable[[Tensor], Tensor],
    rebuilt: Callable[[Mapping[Any, Any], dict[Any, Any]], Mapping[Any, Any]] = lambda _, parts: parts,
) -> Any:  # noqa: ANN401
    """Apply a function to every tensor in nested tuples, lists and mappings.

    Args:
        item: A batch.
        function: What becomes of a tensor.
        rebuilt: Returns the mapping that stands for one, from it and its new parts; without it they are dicts.
    """
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, Mapping):
        return rebuilt(item, {key: map_tensors(part, function, rebuilt) for key, part in item.items()})
    if isinstance(item, (tuple, list)):
        parts = [map_tensors(part, function, rebuilt) for part in item]
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
