"""Defines what a sample of a batch is, how a batch moves to a device, and which batches of a data set are held."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import count, islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from bnlab.errors import BnlabError, BnlabWarning, UsageError
from bnlab.observe.passes.calling import (
    IMAGE_KEYS,
    Batch,
    Forward,
    inputs_taken,
    is_list_of_images,
    is_opaque,
    require_forward,
    run_batch,
)
from bnlab.observe.passes.offloaded import has_hooks_of_accelerate

__all__ = [
    "MAX_KEPT",
    "Batch",
    "Forward",
    "KeptBatches",
    "MaxBatches",
    "batches_of",
    "columns_of",
    "copy_of_batch",
    "first_samples",
    "input_of_batch",
    "inputs_taken",
    "is_list_of_images",
    "keep",
    "map_tensors",
    "parts_of",
    "require_data",
    "require_forward",
    "require_max_batches",
    "run_batch",
    "samples_at",
    "samples_in",
    "shuffled_batches",
    "spread",
    "spread_places",
    "tensors_in",
    "with_tensors",
]

MaxBatches: TypeAlias = int | Literal["auto"] | None
"""How many batches of a data set are used: at most this number, all of them (None), or at most `MAX_KEPT` ("auto")."""

MAX_KEPT = 64
"""Largest number of batches held in memory. Measurements that need several passes then read the data once."""

_MIN_PART = 4
"""Smallest number of samples in a part of a batch."""

_MAX_SHUFFLED = 12
"""Largest number of batches whose samples are shuffled together."""


def input_of_batch(batch: Batch) -> Batch:
    """Return the part of a batch with the input: the first item of a tuple or list, else the whole batch.

    A list of images is an input as a whole.
    """
    if not isinstance(batch, (tuple, list)) or not batch or is_opaque(batch):
        return batch
    return batch if isinstance(batch, list) and is_list_of_images(batch) else batch[0]


def samples_in(batch: Batch) -> int:
    """Return the number of samples in a batch; 0 where it is not known.

    It is the first dimension of the first tensor of the input, the number of images in a list of them, or of sequences
    in a packed one. A batch of graphs has as many samples as graphs, and a single graph as many as nodes.
    """
    value = input_of_batch(batch)
    if isinstance(value, Mapping):
        images = [value[key] for key in IMAGE_KEYS if key in value]
        value = images[0] if len(images) == 1 else value
    if is_list_of_images(value):
        return len(value)
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if is_opaque(value):
        counts = (getattr(value, name, None) for name in ("num_graphs", "num_nodes"))
        known = next((count for count in counts if isinstance(count, int)), None)
        if known is not None:
            return known
        value = getattr(value, "__dict__", value)
    return next((tensor.size(0) for tensor in tensors_in(value) if tensor.dim()), 0)


def first_samples(batch: Batch, count: int) -> Batch:
    """Return the first samples of a batch; every tensor whose first dimension is the number of samples is cut."""
    return samples_at(batch, slice(count))


def samples_at(batch: Batch, places: slice | Tensor) -> Batch:
    """Return the samples of a batch at some places; every tensor whose first dimension is the number of samples is cut.

    A list of images is cut as a list, and so is a list of as many targets beside it. An object that moves itself to a
    device, such as a graph, stays whole.

    Args:
        batch: A batch.
        places: A slice, or numbers of samples, shape (n,), int64.
    """
    size = samples_in(batch)
    cut = partial(map_tensors, function=partial(_rows, size=size, places=places))
    if not is_list_of_images(input_of_batch(batch)):
        return cut(batch)
    chosen = range(size)[places] if isinstance(places, slice) else places.tolist()
    if input_of_batch(batch) is batch:
        return [batch[place] for place in chosen]
    parts = [
        type(part)(part[place] for place in chosen) if type(part) in (list, tuple) and len(part) == size else cut(part)
        for part in batch
    ]
    return _sequence_like(batch, parts)


def spread_places(total: int, count: int) -> list[int]:
    """Return up to so many places in data with a number of batches, one in each of equally long stretches.

    The place within a stretch is drawn with a fixed seed, so that no period of the data, such as two domains in turn,
    meets one of the places.
    """
    if total <= count:
        return list(range(total))
    bounds = [step * total // count for step in range(count + 1)]
    generator = random.Random(0)
    return [generator.randrange(low, high) for low, high in itertools.pairwise(bounds)]


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return up to so many of the batches, at the places of :func:`spread_places`."""
    return [batches[place] for place in spread_places(len(batches), count)]


def parts_of(batch: Batch, parts: int) -> Iterator[Batch]:
    """Yield a batch in up to so many parts, each with `_MIN_PART` samples or more, unless the batch has fewer.

    Every tensor whose first dimension is the number of samples is cut.
    """
    size = samples_in(batch)
    step = max(_MIN_PART, -(-size // parts))
    if size <= step:
        yield batch
        return
    first = first_samples(batch, step)
    if samples_in(first) == size:  # an object whose tensors cannot be replaced
        yield batch
        return
    yield first
    for start in range(step, size, step):
        yield samples_at(batch, slice(start, start + step))


def _rows(tensor: Tensor, *, size: int, places: slice | Tensor) -> Tensor:
    if not tensor.dim() or tensor.size(0) != size:
        return tensor
    return tensor[places.to(tensor.device) if isinstance(places, Tensor) else places]


class _Without:
    """A data set without some of its batches, which can be iterated more than once."""

    def __init__(self, data: Iterable[Batch], left_out: Collection[int]) -> None:
        self._data, self._left_out = data, left_out

    def __iter__(self) -> Iterator[Batch]:
        return (batch for index, batch in enumerate(self._data) if index not in self._left_out)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return the attribute of the data itself."""
        if name.startswith("_"):  # an object that is being copied has no data yet
            raise AttributeError(f"{name!r} is not known of data without some batches")
        return getattr(self._data, name)


class KeptBatches(Sequence[Batch]):
    """Batches of a data set that are held in memory, which avoids reading the data more than once.

    Args:
        batches: The batches that are held, by their places in the data.
        data: The data set from which the batches come. Where every batch is held, attributes that a list lacks, such as
            the `dataset` of a loader, are those of the data set.
        total: Number of batches in the data; None where it is not known.
        uses_all: Whether every batch is to be used, which takes another pass over the data where some are not held.
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
        """Return a copy of a held batch, which the caller may change; a list of copies for a slice."""
        chosen = self._held[index]
        return [copy_of_batch(batch) for batch in chosen] if isinstance(index, slice) else copy_of_batch(chosen)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return the attribute of the data itself if every batch is held: the `dataset` of a part has another size."""
        if name.startswith("_") or not self.is_whole:
            raise AttributeError(f"{name!r} is not known of a part of the data")
        return getattr(self._data, name)

    @property
    def is_whole(self) -> bool:
        """Whether every batch of the data is held."""
        return self._is_whole and not self._left_out

    @property
    def source(self) -> Iterable[Batch]:
        """The original data, without the batches that are left out."""
        return _Without(self._data, self._left_out) if self._left_out else self._data

    @property
    def everything(self) -> Iterable[Batch]:
        """Every batch in use: the data itself if it has more batches than are held, otherwise the held batches."""
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
    """Read a data set once, and hold the batches in use, or up to `MAX_KEPT` of them.

    Where the data have more batches than are held, the held ones are spread evenly over data with a length, and are the
    first batches of data without one.

    Args:
        name: Name of the data in error messages.
        data: Batches. A :class:`KeptBatches` is returned unchanged.
        max_batches: Number of batches to use and hold. None uses all and holds up to `MAX_KEPT`. "auto" uses and holds
            all, or `MAX_KEPT` if there are more.

    Raises:
        UsageError: If there is no batch, or if reading the batches raises.
    """
    if isinstance(data, KeptBatches):
        return data
    total = _length(data)
    max_kept = MAX_KEPT if max_batches is None or max_batches == "auto" else max_batches
    wanted = None if total is None or total <= max_kept else set(spread_places(total, max_kept))
    try:
        kept, count, has_ended = _picked(data, max_kept, wanted)
    except BnlabError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{name}: it must yield batches, got {type(error).__name__}: {text[:300]}") from error
    if has_ended:
        total = count  # len(data) may be wrong
    elif wanted is None:
        total = None
    if not kept:
        raise UsageError(f"{name}: it must hold at least one batch, got none.")
    if total is None and max_batches == "auto":
        warnings.warn(
            f"{name}: it must have a length for {max_kept} batches to be spread over it, got none: the first "
            f"{max_kept} are used. Pass max_batches=None to use all of them, or a number.",
            BnlabWarning,
            stacklevel=2,
        )
    return KeptBatches(kept, data, total, uses_all=max_batches is None)


def _picked(data: Iterable[Batch], max_kept: int, wanted: Collection[int] | None) -> tuple[dict[int, Batch], int, bool]:
    """Read the wanted batches, or the first ones; return them, how many were read, and whether the data ended.

    Batches are copied, because a loader may reuse the memory. Where data have fewer batches than their length states,
    and no more than `max_kept`, all of them are kept.
    """
    first: dict[int, Batch] = {}
    spread: dict[int, Batch] = {}
    place = 0
    for batch in data:
        if wanted is None and place == max_kept:
            return first, place, False
        own = copy_of_batch(batch) if place < max_kept or (wanted is not None and place in wanted) else None
        if place < max_kept:
            first[place] = own
        if wanted is not None and place in wanted:
            spread[place] = own
            if len(spread) == len(wanted):
                return spread, place + 1, False
        place += 1
    return (first if place <= max_kept else spread), place, True


def copy_of_batch(item: Batch) -> Batch:
    """Return a copy of a batch, with new containers and tensors of the same types."""
    return map_tensors(item, torch.clone, _copy_of_object)


def _copy_of_object(item: Any) -> Any:  # noqa: ANN401
    clone = getattr(item, "clone", None)
    return clone() if callable(clone) else copy.copy(item)


def _length(data: Iterable[Batch]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except Exception:  # the __len__ of a loader of a stream raises
        return None


def require_max_batches(value: MaxBatches) -> MaxBatches:
    """Return `value` if it is "auto", None or a number of at least 1.

    Raises:
        UsageError: If the value is anything else.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (is_count or value is None or value == "auto"):
        raise UsageError(f"max_batches: value must be 'auto', None or a number of at least 1, got {value!r}.")
    return value


def shuffled_batches(data: Sequence[Batch], taken: int = 1) -> list[Batch]:
    """Return some batches of a data set, spread over it, with their samples shuffled among them at random.

    Args:
        data: Batches.
        taken: Number of elements of a tuple or list that are input. Where samples of whole batches cannot be shuffled,
            as with targets of different lengths, these elements alone are. 0 if only whole batches are of use.

    Returns:
        Up to `_MAX_SHUFFLED` batches; an empty list if the shapes of their tensors do not allow shuffling.
    """
    kept = spread(data, _MAX_SHUFFLED)
    sizes = [samples_in(batch) for batch in kept]
    total = sum(sizes)
    if len(kept) < 2 or min(sizes) < 1:
        return []
    columns = columns_of(kept, sizes)
    if not columns and taken:
        kept = [batch[:taken] if type(batch) in (tuple, list) else batch for batch in kept]
        columns = columns_of(kept, sizes)
    if not columns:
        return []
    order = torch.split(torch.randperm(total, generator=torch.Generator().manual_seed(0)), sizes)
    mixed = [torch.cat(column) for column in columns]
    return [with_tensors(batch, [m[part] for m in mixed]) for batch, part in zip(kept, order, strict=True)]


def columns_of(items: Sequence[Batch], sizes: Sequence[int]) -> list[list[Tensor]] | None:
    """Return the tensors of some batches, or parts of batches, by their place; None if samples do not fit together.

    Args:
        items: Batches or parts of them.
        sizes: Number of samples in each, which must be the first dimension of its tensors.

    Returns:
        A list for each place, with one tensor of every item. They have the same shape without the first dimension, and
        the same dtype. Tensors without dimensions are left out.
    """
    if not all(map(_has_columns, items)):
        return None
    rows = [[tensor for tensor in tensors_in(item) if tensor.dim()] for item in items]
    if len({len(row) for row in rows}) != 1:
        return None
    columns = [list(column) for column in zip(*rows, strict=True)]
    fit = ([tensor.size(0) for tensor in column] == list(sizes) for column in columns)
    alike = (len({(tensor.shape[1:], tensor.dtype) for tensor in column}) == 1 for column in columns)
    return columns if all(fit) and all(alike) else None


def _has_columns(item: Batch) -> bool:
    """Return whether the samples of an item are the rows of its tensors: not those of a graph or a list of images."""
    if isinstance(item, Mapping):
        return all(map(_has_columns, item.values()))
    if is_opaque(item) or is_list_of_images(item):
        return False
    return all(map(_has_columns, item)) if isinstance(item, (tuple, list)) else True


def with_tensors(item: Batch, tensors: Iterable[Tensor]) -> Batch:
    """Return a batch, or a part of one, with other tensors in place of those that have dimensions, in their order."""
    waiting = iter(tensors)
    return map_tensors(item, lambda tensor: next(waiting) if tensor.dim() else tensor)


def require_data(name: str, data: Any) -> Iterable[Batch]:  # noqa: ANN401 - a caller may pass anything
    """Return data that can be iterated more than once. A function is called for each pass, and returns the batches.

    Raises:
        UsageError: If `data` is a one-shot iterator, a single tensor, or neither iterable nor a function.
    """
    if isinstance(data, Tensor):
        raise UsageError(f"{name}: it must be an iterable of batches, got one tensor. Wrap it: [tensor].")
    if callable(data) and not isinstance(data, (Iterable, nn.Module)):
        return _Stream(name, data)
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        way_out = f" Pass DataLoader({name}, batch_size=32)." if isinstance(data, Dataset) else ""
        raise UsageError(f"{name}: it must be an iterable of batches, got {type(data).__name__}.{way_out}")
    if isinstance(data, Iterator):
        raise UsageError(
            f"{name}: it must be an iterable that can be run through again, got a one-shot {type(data).__name__}, "
            f"whose second pass would be empty. Give list({name}), the loader itself, or a function that returns a new "
            "iterator."
        )
    return data


class _Stream:
    """Batches that a function returns anew for each pass."""

    def __init__(self, name: str, function: Callable[[], Iterable[Batch]]) -> None:
        self._name, self._function = name, function
        self._last: object = None

    def __iter__(self) -> Iterator[Batch]:
        batches: object = self._function()
        if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
            raise UsageError(
                f"{self._name}: the function must return an iterable of batches, got {type(batches).__name__}."
            )
        if isinstance(batches, Iterator) and batches is self._last:
            raise UsageError(
                f"{self._name}: the function must return a new iterator on each call, got the same "
                f"{type(batches).__name__} again. Make the iterator inside the function."
            )
        self._last = batches
        return iter(batches)


def batches_of(data: Iterable[Any], like: nn.Module) -> Iterator[Any]:
    """Yield every batch on the device of the model `like`, unless the model places its input itself."""
    device = _device_of(like)
    for batch in data:
        yield batch if device is None else _moved(batch, device)


def _device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model; None for a model that places its input itself, or that has no tensors.

    A model on several devices places its input. So does one with hooks of accelerate, which keep the weights elsewhere
    and load them for each call.
    """
    if has_hooks_of_accelerate(model):
        return None
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def _moved(batch: Batch, device: torch.device) -> Batch:
    def move(item: Any) -> Any:  # noqa: ANN401
        other = copy.copy(item)  # a graph moves itself in place, and a batch may be held for later
        result = other.to(device)
        return other if result is None else result

    return map_tensors(batch, lambda tensor: tensor.to(device), move)


def map_tensors(
    item: Any,  # noqa: ANN401
    function: Callable[[Tensor], Any],
    of_object: Callable[[Any], Any] = lambda item: item,
) -> Any:  # noqa: ANN401
    """Apply a function to every tensor in nested tuples, lists, mappings and dataclasses, whose types are kept.

    Args:
        item: A batch.
        function: Maps a tensor to its replacement.
        of_object: Maps an object that moves itself to a device, such as a graph, to its replacement.
    """
    if isinstance(item, Tensor):
        return function(item)
    if is_opaque(item):
        return of_object(item)
    if isinstance(item, Mapping):
        return _mapping_like(item, {key: map_tensors(part, function, of_object) for key, part in item.items()})
    if isinstance(item, (tuple, list)):
        return _sequence_like(item, [map_tensors(part, function, of_object) for part in item])
    if not is_dataclass(item) or isinstance(item, type):
        return item
    other = copy.copy(item)
    for name, part in _fields_of(item).items():
        object.__setattr__(other, name, map_tensors(part, function, of_object))  # it may be frozen
    return other


def _mapping_like(item: Mapping[Any, Any], parts: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(item) is dict or not isinstance(item, MutableMapping):
        return parts
    other = copy.copy(item)
    other.update(parts)
    return other


def _sequence_like(item: Any, parts: list[Any]) -> Any:  # noqa: ANN401
    return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)


def _fields_of(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    if hasattr(record, "__dict__"):
        return dict(vars(record))
    return {field.name: getattr(record, field.name) for field in fields(record) if hasattr(record, field.name)}


def tensors_in(value: Any) -> list[Tensor]:  # noqa: ANN401
    """Return every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list, set)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    return [tensor for item in _fields_of(value).values() for tensor in tensors_in(item)]
