"""Defines what a sample of a batch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bnlab.observe.passes.calling import IMAGE_KEYS, Batch, is_list_of_images, is_opaque
from bnlab.observe.passes.kept_batches import spread
from bnlab.observe.passes.tensors import map_tensors, sequence_like, tensors_in, with_tensors

__all__ = [
    "columns_of",
    "first_samples",
    "input_of_batch",
    "parts_of",
    "samples_at",
    "samples_in",
    "shuffled_batches",
]

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
    return sequence_like(batch, parts)


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
