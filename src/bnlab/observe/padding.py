"""Measures what the padding of the training inputs changes in the batch statistics of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnlab.functional.moments import moments_in_blocks
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, PaddingEffect
from bnlab.observe.passes.batches import input_of_batch
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import spread
from bnlab.observe.passes.order import input_of
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.statistics import Beside, LayerCall, measuring
from bnlab.observe.passes.subject import ForwardFailed, Subject, usage_error_unless
from bnlab.observe.passes.tensors import tensors_in
from bnlab.observe.tails import Extent, Tails, input_tensors, padded_ends

__all__ = ["with_padding"]

_BATCHES = 8
"""Number of training batches that are examined and measured."""

_MAX_LOST = 0.25
"""Largest share of positions that a layer may have lost to convolutions without padding, relative to those left."""

_ROUNDING = 1.01
"""Number of positions by which the lengths that two batches have at a layer may differ from their common ratio."""


def with_padding(
    evidence: ModelEvidence, subject: Subject, modules: Mapping[str, nn.Module], train_data: Sequence[Batch]
) -> ModelEvidence:
    """Return the evidence with the padding of the training inputs, and with its effect on every layer.

    Args:
        evidence: The evidence so far.
        subject: The model, which is restored afterwards.
        modules: Its BN layers, by path.
        train_data: Batches of the training data, of which a few are used.

    Raises:
        ForwardFailed: If forward raises.
    """
    batches = _few_of(train_data)
    inputs = input_tensors(batches)
    if not inputs:
        unknown = "the input of its model is no tensor of 2 to 4 axes"
        return replace(evidence, layers=tuple(replace(layer, padding_unknown=unknown) for layer in evidence.layers))
    of_inputs = [tails for column in inputs if (tails := padded_ends(column, batches)) is not None]
    if not of_inputs:
        return evidence
    tails = max(of_inputs, key=lambda one: one.padding.certain)
    meters = _measured(subject, modules, batches, tails)
    layers = tuple(_with_effect(layer, meters[layer.name]) for layer in evidence.layers)
    return replace(evidence, layers=layers, padding=tails.padding)


def _few_of(train_data: Sequence[Batch]) -> list[Batch]:
    """Return a few batches, from that with the smallest samples to that with the largest if their sizes differ."""
    sizes = [sum(tensor[:1].numel() for tensor in tensors_in(input_of_batch(batch))) for batch in train_data]
    if len(set(sizes)) < 2:
        return spread(train_data, _BATCHES)
    by_size = sorted(range(len(sizes)), key=lambda index: sizes[index])
    ranks = np.linspace(0, len(sizes) - 1, min(len(sizes), _BATCHES)).round().astype(int)
    return [train_data[by_size[rank]] for rank in ranks]


def _with_effect(layer: ModelLayer, meter: _Meter) -> ModelLayer:
    if layer.execution is not None and layer.execution.calls > 1:
        return replace(layer, padding_unknown="it runs more than once")
    return replace(layer, padding=meter.effect(), padding_unknown=meter.unknown)


def _measured(
    subject: Subject, modules: Mapping[str, nn.Module], batches: Sequence[Batch], tails: Tails
) -> dict[str, _Meter]:
    """Run the batches, the longest first, and return a meter for every layer."""
    meters = {path: _Meter(channels_of(module), tails.dimensions) for path, module in modules.items()}
    longest_first = sorted(range(len(batches)), key=lambda index: -tails.extents[index][0].length)
    extents: Sequence[Extent] = ()

    def look(path: str, x: Tensor, _: Tensor) -> Beside | None:
        return meters[path].look(x, extents)

    def take(call: LayerCall) -> None:
        meters[call.path].take(call)

    rule = "forward must run on every batch of train_data"
    with usage_error_unless(rule, ForwardFailed), measuring(subject, modules, take, look=look) as run:
        for path, module in modules.items():  # measuring restores the hooks
            module.register_forward_pre_hook(meters[path].see_arguments, with_kwargs=True)
        for index in longest_first:
            extents = tails.extents[index]
            for batch in batches_of([batches[index]], subject.model):
                run.one_batch(batch)
    return meters


class _Meter:
    """Compares the statistics of one layer over all positions with those over the positions that are no padding.

    Args:
        channels: C.
        dimensions: Number of axes of the input of the model.
    """

    def __init__(self, channels: int, dimensions: int) -> None:
        self._channels, self._dimensions = channels, dimensions
        self._runs = self._is_masked = self._is_unmatched = False
        self._alignments: list[_Alignment] | None = None

    def see_arguments(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Record whether the layer gets a mask beside its input."""
        x = input_of(arguments, keywords)
        others = chain((("", value) for value in arguments), keywords.items())
        self._is_masked |= any(_is_mask(name, value, x) for name, value in others if value is not x)

    def look(self, x: Tensor, extents: Sequence[Extent]) -> Beside | None:
        """Return the statistics of an input in a batch with these extents, under every alignment that fits it."""
        self._runs = True
        if self._is_masked or not _has_positions(x, extents):
            return None
        if self._alignments is None:
            fits = x.size(1) == self._channels
            self._alignments = _alignments(x, extents, self._dimensions) if fits else []
        kept = {alignment: alignment.kept(x, extents) for alignment in self._alignments}
        self._alignments = [alignment for alignment, positions in kept.items() if positions is not None]
        self._is_unmatched = not self._alignments
        fitting = [(alignment, positions) for alignment, positions in kept.items() if positions is not None]
        usable = [(alignment, positions) for alignment, positions in fitting if np.count_nonzero(positions) > 1]
        tensors = [value for _, positions in usable for value in _moments(x, positions)]
        return Beside(tensors, [(alignment, p.size, int(np.count_nonzero(p))) for alignment, p in usable])

    def take(self, call: LayerCall) -> None:
        """Add a call."""
        self._runs = True
        if call.beside is None or not call.is_finite:
            return
        values = iter([tensor.numpy().astype(np.float64) for tensor in call.beside.tensors])
        for alignment, count, rest in cast("list[tuple[_Alignment, int, int]]", call.beside.note):
            alignment.add(count, rest, *islice(values, 4))

    @property
    def unknown(self) -> str | None:
        """Why the effect is not known; None where it is."""
        if not self._runs:
            return "it did not run"
        return "its positions cannot be matched with those of the input" if self._is_unmatched else None

    def effect(self) -> PaddingEffect | None:
        """Return the effect of padding; None without any. The axis is the one along which padding is the most alike."""
        if self._is_masked or not self._alignments:
            return None
        return min(self._alignments, key=lambda alignment: alignment.spread).effect()


def _is_mask(name: str, value: object, x: Tensor) -> bool:
    """Return whether an argument of a layer tells it which positions are padding."""
    if not isinstance(value, Tensor):
        return False
    if "mask" in name or "length" in name or value.dtype == torch.bool:
        return True
    positions = (x.size(0), *x.shape[2:])
    return value.shape in (positions, (x.size(0), 1, *x.shape[2:])) and bool(((value == 0) | (value == 1)).all())


def _has_positions(x: Tensor, extents: Sequence[Extent]) -> bool:
    """Return whether an input has positions that may be padding: not one value per sample, and not packed sequences."""
    samples = len(extents[0].start)
    if x.dim() > 2:
        return x[0, 0].numel() > 1
    packed, whole = int((extents[0].stop - extents[0].start).sum()), samples * extents[0].length
    return x.dim() == 2 and x.size(0) != samples and (x.size(0) != packed or packed == whole)


def _alignments(x: Tensor, extents: Sequence[Extent], dimensions: int) -> list[_Alignment]:
    """Return the ways in which the positions of a layer may follow those of the input."""
    samples, spatial = len(extents[0].start), range(2, x.dim())
    if x.dim() == 2:
        layouts = ("sample by sample", "position by position") if len(extents) == 1 else ()
        return [_Alignment(layout) for layout in layouts]
    if x.size(0) != samples:
        return []
    own = tuple(extent.axis for extent in extents)
    if dimensions == x.dim() == 4:
        return [_Alignment(own)]
    length = extents[0].length
    over_positions = own[0] == 1 and x.size(1) == length and length not in x.shape[2:]
    return [] if len(own) > 1 or over_positions else [_Alignment((axis,)) for axis in spatial]


class _Alignment:
    """One way in which the positions of a layer follow those of the input, with the statistics under it.

    Args:
        layout: The axes of the layer that follow those of the input, or the order of the rows of an input (N*L, C).
    """

    def __init__(self, layout: tuple[int, ...] | str) -> None:
        self._layout = layout
        self._ratios: list[tuple[int, float]] = []
        self._batches = self._positions = self._padded = 0
        self._sums: dict[str, Floats] = {}

    def add(self, count: int, rest: int, mean: Floats, var: Floats, valid_mean: Floats, valid_var: Floats) -> None:
        """Add the number and the statistics of all positions of a call, and of those that are no padding."""
        padded = _padded_var(count, mean, var, rest, valid_mean, valid_var)
        values = {"mean": mean, "var": var, "valid_mean": valid_mean, "valid_var": valid_var, "padded": padded}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._batches += 1
        self._positions += count
        self._padded += count - rest

    def kept(self, x: Tensor, extents: Sequence[Extent]) -> NDArray[np.bool_] | None:
        """Return where the layer gets no padding, (N, *spatial) or (N*L,); None if its positions are others."""
        if isinstance(self._layout, str):
            extent = extents[0]
            grid = _grid(extent.length, extent, 1, 0.0)
            if x.dim() != 2 or x.size(0) != grid.size:
                return None
            return (grid if self._layout == "sample by sample" else grid.T).reshape(-1)
        sizes = [x.size(axis) for axis in self._layout]
        if not self._ratios:
            self._ratios = [_ratio(extent.length, size) for extent, size in zip(extents, sizes, strict=True)]
        kept = np.ones((x.size(0), *x.shape[2:]), dtype=bool)
        for axis, size, extent, (ratio, lost) in zip(self._layout, sizes, extents, self._ratios, strict=True):
            own = extent.length / ratio - size
            if not -_ROUNDING <= lost <= max(1, _MAX_LOST * size) or abs(own - lost) > _ROUNDING:
                return None
            shape = [x.size(0), *(size if place == axis else 1 for place in range(2, x.dim()))]
            kept &= _grid(size, extent, ratio, own).reshape(shape)
        return kept

    @property
    def spread(self) -> float:
        """Median over channels of the variance within the padding, relative to the whole variance."""
        if not self._batches:
            return np.inf
        return float(np.median(self._sums["padded"] / np.maximum(self._sums["var"], np.finfo(np.float64).tiny)))

    def effect(self) -> PaddingEffect | None:
        """Return the effect of padding; None without any padding or any batch."""
        if not self._padded:
            return None
        names = ("mean", "var", "valid_mean", "valid_var")
        means = {name: self._sums[name] / self._batches for name in names}
        return PaddingEffect(share=self._padded / self._positions, **means)


def _ratio(length: int, size: int) -> tuple[int, float]:
    """Return how many positions of the input a position of the layer covers, and how many positions are missing."""
    ratio = max(1, round(length / size))
    return ratio, length / ratio - size


def _grid(size: int, extent: Extent, ratio: int, lost: float) -> NDArray[np.bool_]:
    """Return which positions of a layer cover no padding alone. Shape (N, size).

    Half of the missing positions are taken from either end of the input, as a convolution without padding does.
    """
    below = (np.arange(size) + lost / 2) * ratio
    return (below < extent.stop[:, None]) & (below + ratio > extent.start[:, None])


def _moments(x: Tensor, kept: NDArray[np.bool_]) -> list[Tensor]:
    """Return the mean and the biased variance of all positions, then of the kept ones, in float64."""
    positions = torch.from_numpy(kept).to(x.device)
    of_all, of_kept = (moments_in_blocks(x, mask.unsqueeze(1)) for mask in (torch.ones_like(positions), positions))
    return [of_all.mean, of_all.var, of_kept.mean, of_kept.var]


def _padded_var(count: int, mean: Floats, var: Floats, rest: int, valid_mean: Floats, valid_var: Floats) -> Floats:
    """Return the variance of the positions that are left out, by the law of total variance; 0 without any."""
    padded = count - rest
    if not padded:
        return np.zeros_like(mean)
    padded_mean = (count * mean - rest * valid_mean) / padded
    between = (rest * (valid_mean - mean) ** 2 + padded * (padded_mean - mean) ** 2) / count
    return np.maximum((var - between) * count - rest * valid_var, 0) / padded
