"""Recognises padding in the inputs of a model: constant runs at one end of the samples, and what shows their cause."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnlab.observe.model_evidence import Padding
from bnlab.observe.passes.batches import input_of_batch
from bnlab.observe.passes.calling import Batch

__all__ = ["Extent", "Tails", "input_tensors", "padded_ends"]

Counts: TypeAlias = NDArray[np.int64]
Side: TypeAlias = Literal["end", "beginning"]

_AXES = {2: (1,), 3: (1, 2), 4: (2, 3)}
"""The axes that may hold positions, for each number of axes of an input."""

_TIMES_LONGER = 3
"""How many times longer than every other run of a sample a run at its end must be to count as a tail."""

_TYPICAL = 0.95
"""Share of the samples whose runs inside must be short in comparison with the tails."""

_MIN_TAILS = 3
"""Smallest number of samples with a tail."""

_MIN_SHARE = 0.05
"""Smallest share of samples with a tail, where no mask shows that they are padding."""

_MIN_MASKED = 0.5
"""Share of the positions in tails that a mask must leave out at least."""

_MASK = re.compile(r"mask", re.IGNORECASE)
"""Finds the names of masks."""

_LENGTHS = re.compile(r"(?<![a-z])(seq)?len(s|gth|gths)?$", re.IGNORECASE)
"""Finds the names of lengths, such as `input_lengths`, `x_len` and `seqlens`."""

_NO_INPUT = re.compile(r"mask|label|target|(?<![a-z])len(s|gth|gths)?$|position|token_type", re.IGNORECASE)
"""Finds the names of tensors that stand beside the input of a model."""


@dataclass(frozen=True, eq=False)
class Extent:
    """The positions of the samples of a batch that are no padding, along one axis.

    Attributes:
        axis: The axis of the input.
        length: L, the size of this axis.
        start: The first of these positions. Shape (N,).
        stop: The position behind the last of them. Shape (N,).
    """

    axis: int
    length: int
    start: Counts
    stop: Counts


@dataclass(frozen=True, eq=False)
class Tails:
    """The padding in the batches of a data set, or what looks like it.

    Attributes:
        extents: For each batch, the extents along the axes that are padded.
        padding: What is known about it.
        dimensions: Number of axes of the input.
    """

    extents: tuple[tuple[Extent, ...], ...]
    padding: Padding
    dimensions: int


@dataclass(frozen=True, eq=False)
class _Ends:
    """The runs of equal positions at one end of the samples of a batch. Arrays of shape (N,), but for `fill`.

    Attributes:
        length: L, the number of positions.
        run: Length of the run at this end; 1 where the last two positions differ, L for a constant sample.
        inside: Length of the longest other run; 0 for a constant sample.
        fill: The values at this end. Shape (N, K).
    """

    length: int
    run: Counts
    inside: Counts
    fill: NDArray[np.float64]

    @property
    def is_tail(self) -> NDArray[np.bool_]:
        return (self.inside > 0) & (self.run > _TIMES_LONGER * self.inside)

    @property
    def is_full(self) -> NDArray[np.bool_]:
        return (self.inside > 0) & (self.run <= self.inside)

    @property
    def tail(self) -> Counts:
        """Length of the tail of each sample; 0 without one."""
        return np.where(self.is_tail, self.run, 0)


def input_tensors(batches: Sequence[Batch]) -> list[list[Tensor]]:
    """Return the tensors in the input of the model that may be padded, each with one tensor for every batch.

    The input of a model is the first element of a tuple or list, or the whole batch. Masks, lengths and labels that
    stand beside it in a mapping, and tensors of fewer than 2 or more than 4 axes, are left out.
    """
    by_batch = [
        {name: tensor for name, tensor in _named(input_of_batch(batch)) if not _NO_INPUT.search(name)}
        for batch in batches
    ]
    names = [name for name in by_batch[0] if all(name in others for others in by_batch)] if by_batch else []
    columns = [[tensors[name] for tensors in by_batch] for name in names]
    return [column for column in columns if _is_examinable(column)]


def _is_examinable(column: Sequence[Tensor]) -> bool:
    dimensions, dtype = column[0].dim(), column[0].dtype
    are_plain = all(tensor.layout == torch.strided and not tensor.is_nested for tensor in column)
    are_alike = all(tensor.dim() == dimensions and tensor.numel() > 0 for tensor in column)
    return are_plain and are_alike and dimensions in _AXES and dtype != torch.bool and not dtype.is_complex


def padded_ends(column: Sequence[Tensor], batches: Sequence[Batch]) -> Tails | None:
    """Return the tails of an input over some batches, or None where there are none.

    A tail is an exactly constant run of positions at one end of a sample that is more than three times longer than each
    other run of the sample. Images of one size count as having none, because their borders are often constant. The
    tails are certain to be padding in two cases:

    - A mask or lengths in the batch agree with them.
    - The batches have different lengths, the tails hold one value, and every batch has a sample without a tail, as
      samples have that are padded to the longest one in the batch.

    Args:
        column: One tensor for each batch: (N, L), (N, C, L), (N, L, C) or (N, C, H, W).
        batches: The batches that hold the tensors.
    """
    dimensions = column[0].dim()
    companions = _companions(batches, column)
    candidates = []
    for axis in _AXES[dimensions]:
        sizes = {tensor.size(axis) for tensor in column}
        if max(sizes) <= _TIMES_LONGER or (dimensions == 4 and len(sizes) == 1):
            continue
        both = [_both_ends(tensor, axis) for tensor in column]
        for index, side in enumerate(get_args(Side)):
            tails = _tails(column, axis, side, [ends[index] for ends in both], companions)
            if tails is not None and (tails.padding.certain or dimensions < 4):
                candidates.append(tails)
    if not candidates:
        return None
    best = max(candidates, key=lambda tails: (tails.padding.certain, tails.padding.share))
    return _joined([tails for tails in candidates if tails.padding.certain]) if dimensions == 4 else best


def _named(item: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401 - a batch may be anything
    """Yield every tensor and every list of integers in a batch, with a name: its key, or its places in tuples."""
    if isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, Mapping):
        for key, part in item.items():
            yield from _named(part, str(key))
    elif isinstance(item, (tuple, list)):
        if item and all(type(part) is int for part in item):
            yield name, torch.tensor(item)
            return
        keys = getattr(item, "_fields", None) or [f"{name}[{index}]" for index in range(len(item))]
        for key, part in zip(keys, item, strict=True):
            yield from _named(part, key)
    elif hasattr(item, "__dataclass_fields__") and not isinstance(item, type):
        yield from _named(vars(item))


def _companions(batches: Sequence[Batch], column: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return the other tensors that every batch has, by name."""
    by_batch = [
        {name: other for name, other in _named(batch) if other is not tensor and other.dim() > 0}
        for batch, tensor in zip(batches, column, strict=True)
    ]
    return {
        name: [others[name] for others in by_batch]
        for name in by_batch[0]
        if all(name in others for others in by_batch)
    }


def _both_ends(x: Tensor, axis: int) -> tuple[_Ends, _Ends]:
    """Return the runs at the end and at the beginning of the samples."""
    rows = x.detach().movedim(axis, 1)
    samples, length = rows.shape[:2]
    changes = (rows[:, 1:] != rows[:, :-1]).reshape(samples, length - 1, -1).any(2).cpu().numpy()
    sizes = np.ones((4, samples), dtype=np.int64)
    for sample, changed in enumerate(changes):
        edges = np.concatenate([[-1], np.flatnonzero(changed), [length - 1]])
        runs = np.diff(edges)
        sizes[:, sample] = runs[-1], runs[:-1].max(initial=0), runs[0], runs[1:].max(initial=0)
    corner = rows.reshape(samples, length, rows[0, 0].numel()) if x.dim() < 4 else rows.flatten(3)[..., 0]
    last, first = (corner[:, place].cpu().to(torch.float64).numpy() for place in (-1, 0))
    return _Ends(length, sizes[0], sizes[1], last), _Ends(length, sizes[2], sizes[3], first)


def _tails(
    column: Sequence[Tensor], axis: int, side: Side, ends: Sequence[_Ends], companions: Mapping[str, Sequence[Tensor]]
) -> Tails | None:
    """Return the tails at one end of the samples along one axis; None without any that may be padding."""
    proof: str | None = None
    padded = [end.tail for end in ends]
    for name, tensors in companions.items():
        for counts in _readings(tensors, column, axis, side):
            is_named = bool(_MASK.search(name) or _LENGTHS.search(name))
            if _agree(counts, ends, exactly=not is_named):
                proof, padded = f"`{name}` shows where it is", counts
                break
            if is_named and not any(count.any() for count in counts):
                return None  # a mask or lengths that leave nothing out: the constant values are real
    if proof is None:
        if not _are_ragged(ends):
            return None
        if _are_dynamic(ends, images=column[0].dim() == 4):
            proof = "the batches have different lengths, each that of a sample without padding"
    return _summary(column, axis, side, padded, proof)


def _readings(tensors: Sequence[Tensor], column: Sequence[Tensor], axis: int, side: Side) -> Iterator[list[Counts]]:
    """Yield, for each way to read a tensor as a mask or as lengths, the padded positions of every sample by batch."""
    for read in (_from_mask, _from_inverse_mask, _from_lengths, _from_relative_lengths):
        counts = [read(tensor, x, axis, side) for tensor, x in zip(tensors, column, strict=True)]
        readable = [count for count in counts if count is not None]
        if len(readable) == len(counts):
            yield readable


def _from_mask(mask: Tensor, x: Tensor, axis: int, side: Side) -> Counts | None:
    """Return the positions that a mask of zeros and ones leaves out, if these are at one end of every sample."""
    return None if (along := _along(mask, x, axis)) is None or not _is_binary(mask) else _left_out(along, side)


def _from_inverse_mask(mask: Tensor, x: Tensor, axis: int, side: Side) -> Counts | None:
    """Read a mask that is 1 in the padding, as the padding masks of torch.nn.Transformer are."""
    return None if (along := _along(mask, x, axis)) is None or not _is_binary(mask) else _left_out(along == 0, side)


def _is_binary(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def _along(mask: Tensor, x: Tensor, axis: int) -> Tensor | None:
    """Return a mask as (N, L, K), with K values for each position along the axis; None if its shape does not fit."""
    samples, length = x.size(0), x.size(axis)
    if mask.dim() < 2 or mask.size(0) != samples:
        return None
    if mask.numel() == samples * length:
        return mask.reshape(samples, length, 1)
    if mask.shape == x.shape:
        return mask.movedim(axis, 1).reshape(samples, length, -1)
    if x.dim() == 4 and mask.numel() == x[:, 0].numel() and mask.shape[-2:] == x.shape[-2:]:
        return mask.reshape(x[:, 0].shape).movedim(axis - 1, 1)
    return None


def _left_out(along: Tensor, side: Side) -> Counts | None:
    """Return the number of positions where a mask is 0 throughout, if they are all at one end. Shape (N,)."""
    keep = (along != 0).any(2)
    length = keep.size(1)
    kept = keep.sum(1, keepdim=True)
    places = torch.arange(length, device=keep.device)
    whole = places < kept if side == "end" else places >= length - kept
    if not torch.equal(whole, keep):
        return None
    counts: Counts = (length - kept.squeeze(1)).cpu().numpy().astype(np.int64)
    return counts


def _from_lengths(lengths: Tensor, x: Tensor, axis: int, _: Side) -> Counts | None:
    """Read integers of shape (N,) or (N, 1) as the lengths of the samples."""
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.numel() != x.size(0):
        return None
    length = x.size(axis)
    values: Counts = lengths.reshape(-1).cpu().numpy().astype(np.int64)
    return length - values if bool(((values >= 0) & (values <= length)).all()) else None


def _from_relative_lengths(lengths: Tensor, x: Tensor, axis: int, side: Side) -> Counts | None:
    """Read numbers in (0, 1] of shape (N,) as lengths relative to the longest one."""
    if not lengths.is_floating_point() or lengths.shape != (x.size(0),):
        return None
    if not bool(((lengths > 0) & (lengths <= 1)).all()):
        return None
    return _from_lengths((lengths * x.size(axis)).round().long(), x, axis, side)


def _agree(padded: Sequence[Counts], ends: Sequence[_Ends], *, exactly: bool) -> bool:
    """Return whether positions that a tensor may leave out are constant, and are those of the tails.

    Integer labels must not pass for lengths. A tensor whose name says nothing must therefore agree exactly with several
    tails of different length. Otherwise a part of every tail may be real.
    """
    left_out, run = np.concatenate(padded), np.concatenate([end.run for end in ends])
    tail = np.concatenate([end.tail for end in ends])
    if not left_out.any() or bool((left_out > run).any()):
        return False
    if not exactly:
        return bool(left_out[tail > 0].sum() >= _MIN_MASKED * tail.sum())
    are_several = np.count_nonzero(tail) >= _MIN_TAILS and len(set(left_out.tolist())) > 1
    return bool(are_several and (left_out[tail > 0] == tail[tail > 0]).all())


def _are_ragged(ends: Sequence[_Ends]) -> bool:
    """Return whether there are enough tails, of different length, beside which other runs are short."""
    tail, inside = (np.concatenate([getattr(end, name) for end in ends]) for name in ("tail", "inside"))
    kept = np.concatenate([end.length - end.tail for end in ends])
    tails = np.count_nonzero(tail)
    if tails < max(_MIN_TAILS, _MIN_SHARE * len(tail)) or len(set(kept[inside > 0].tolist())) < 2:
        return False
    typical = np.quantile(inside[inside > 0], _TYPICAL)
    return bool(np.median(tail[tail > 0]) > _TIMES_LONGER * typical)


def _are_dynamic(ends: Sequence[_Ends], *, images: bool) -> bool:
    """Return whether every batch is as long as its longest sample, and all tails hold one value.

    A narrow border of an image, which is no tail yet, does not show that the image fills its batch.
    """
    fills = [end.is_full if images else (end.inside > 0) & ~end.is_tail for end in ends]
    if len({end.length for end in ends}) < 2 or not all(fill.any() for fill in fills):
        return False
    values = [end.fill[end.is_tail] for end in ends if end.is_tail.any()]
    return len({value.shape[1] for value in values}) == 1 and bool((np.concatenate(values) == values[0][0]).all())


def _summary(column: Sequence[Tensor], axis: int, side: Side, padded: Sequence[Counts], proof: str | None) -> Tails:
    extents = []
    for x, counts in zip(column, padded, strict=True):
        length = x.size(axis)
        none, all_ = np.zeros_like(counts), np.full_like(counts, length)
        start, stop = (none, length - counts) if side == "end" else (counts, all_)
        extents.append((Extent(axis, length, start, stop),))
    lengths = [x.size(axis) for x in column]
    positions = sum(length * len(counts) for length, counts in zip(lengths, padded, strict=True))
    padding = Padding(
        side=side,
        samples=sum(map(len, padded)),
        padded_samples=sum(int(np.count_nonzero(counts)) for counts in padded),
        share=sum(int(counts.sum()) for counts in padded) / positions,
        lengths=(min(lengths), max(lengths)),
        proof=proof,
    )
    return Tails(tuple(extents), padding, column[0].dim())


def _joined(tails: Sequence[Tails]) -> Tails | None:
    """Return the padding along the height and the width of images as one; None without any."""
    if len(tails) < 2:
        return next(iter(tails), None)
    widest = max(tails, key=lambda one: one.padding.share)
    other = max(
        (one for one in tails if one.extents[0][0].axis != widest.extents[0][0].axis),
        key=lambda one: one.padding.share,
        default=None,
    )
    if other is None:
        return widest
    pairs = zip(widest.extents, other.extents, strict=True)
    return Tails(tuple((*a, *b) for a, b in pairs), widest.padding, widest.dimensions)
