"""Records the channel means of single samples at every layer, with the statistics of the whole data set in every BN.

In this state a sample does not depend on the other samples of its batch, so only a few of each batch need to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.functional.moments import widened
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import Observed
from bnlab.observe.passes.batch_rows import spread_channels
from bnlab.observe.passes.batches import columns_of, first_samples, input_of_batch, samples_at, samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import spread
from bnlab.observe.passes.modes import set_eval_mode
from bnlab.observe.passes.order import input_of
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.population import impose_statistics
from bnlab.observe.passes.subject import Subject
from bnlab.observe.transfers import Pending

__all__ = ["SampleMeans", "sample_means"]

_MAX_BATCHES = 32
_MAX_SAMPLES = 32
"""Largest number of samples of a batch that run. They show differences that matter, and cost little."""

_SMALLER = 0.25
"""Largest share of batches that are left out because they have fewer samples than the others."""

_RESOLUTION = 1e-5
"""Standard deviation of sample means, relative to the values of the channel, that rounding explains."""

_SAME_ROWS = 0.1
"""Largest difference between the same rows of two passes, relative to their spread."""


@dataclass(frozen=True, eq=False)
class SampleMeans:
    """The channel means of samples at one layer.

    Attributes:
        batches: The samples of each batch, shape (samples, c): at most 32 batches with at most 32 samples, drawn at
            random, in at most 32 channels, spread evenly over the layer. Input units.
        sizes: Number of samples in each whole batch.
        resolution: Standard deviation of each column that rounding explains, shape (c,), input units.
    """

    batches: Sequence[Floats]
    sizes: Sequence[int]
    resolution: Floats


def sample_means(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    data: Sequence[Batch],
    observed: Mapping[str, Observed],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, SampleMeans]:
    """Return the channel means of single samples. The model runs in eval mode with the statistics of the data.

    Those of the data serve any model, also one whose running statistics are missing, stale or not finite.

    Args:
        subject: The model, which is restored afterwards.
        layers: The BN layers, by path.
        data: Batches.
        observed: The inputs of the layers over these data, whose mean and variance every layer normalises with.
        advance: Called after every batch.

    Returns:
        One entry for each layer whose input has as many rows as there are samples, or a fixed number of rows for each
        sample. No entry at all where the batches have different shapes.
    """
    chosen = spread(data, _MAX_BATCHES)
    if not _fit_together(chosen):
        return {}
    all_sizes = [samples_in(batch) for batch in chosen]
    enough = int(np.quantile(all_sizes, _SMALLER, method="lower"))
    generator = torch.Generator().manual_seed(0)
    parts = [_drawn(batch, min(enough, _MAX_SAMPLES), generator) for batch in chosen if samples_in(batch) >= enough]
    sizes = [size for size in all_sizes if size >= enough]
    recorders = {path: _Recorder(layer, observed[path]) for path, layer in layers.items() if path in observed}
    statistics = {layers[path]: (seen.mean, seen.var) for path, seen in observed.items() if path in layers}
    of_torch = {layer: pair for layer, pair in statistics.items() if isinstance(layer, _BatchNorm)}
    with subject.untouched(), torch.no_grad(), impose_statistics(of_torch):
        set_eval_mode(subject.model)
        for path, recorder in recorders.items():
            layers[path].register_forward_pre_hook(recorder.take, with_kwargs=True)
        rows = _run(subject, recorders, parts, advance)
    means = {}
    for path, batches in rows.items():
        finite = [(batch, size) for batch, size in zip(batches, sizes, strict=True) if np.isfinite(batch).all()]
        if finite:
            of_batches, whole = zip(*finite, strict=True)
            means[path] = SampleMeans(of_batches, whole, recorders[path].resolution)
    return means


def _run(
    subject: Subject, recorders: Mapping[str, _Recorder], parts: Sequence[Batch], advance: Callable[[], None]
) -> dict[str, list[Floats]]:
    """Run the parts, and return the samples of each of them at every layer whose rows are those of samples."""
    count = samples_in(parts[0])
    rows = _Rows(recorders, count)
    pending = Pending()
    for index, part in enumerate(batches_of(parts, subject.model)):
        subject.run(part)
        calls = {path: recorder.taken() for path, recorder in recorders.items()}
        half: dict[str, list[Tensor]] = {}
        if index == 0:
            subject.run(first_samples(part, max(count // 2, 1)))
            half = {path: recorder.taken() for path, recorder in recorders.items()}
        values = [call for each in (calls, half) for of_layer in each.values() for call in of_layer]
        pending.add(values, partial(rows.add, _numbers(calls), _numbers(half)))
        if pending.is_large:
            pending.settle()
        advance()
    pending.settle()
    return rows.by_layer


def _numbers(calls: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    return {path: len(of_layer) for path, of_layer in calls.items()}


class _Rows:
    """The samples at every layer whose rows are those of samples.

    Attributes:
        by_layer: The samples of each batch so far, by the path of the layer.
    """

    def __init__(self, paths: Iterable[str], count: int) -> None:
        self._count = count
        self._merge: dict[str, _Merge] = {}
        self.by_layer: dict[str, list[Floats]] = {path: [] for path in paths}

    def add(self, numbers: Mapping[str, int], of_half: Mapping[str, int], values: list[Tensor]) -> None:
        """Add the calls of a batch, and of the first half of the first batch, which shows what belongs together."""
        arrays = iter([value.numpy().astype(np.float64) for value in values])
        calls = {path: [next(arrays) for _ in range(number)] for path, number in numbers.items()}
        for path, number in of_half.items():
            self._merge[path] = _merge(calls[path], [next(arrays) for _ in range(number)], self._count)
        for path, of_layer in calls.items():
            one = self._merge[path](of_layer)
            if one is None:
                self.by_layer.pop(path, None)
            elif path in self.by_layer:
                self.by_layer[path].append(one)


_Merge = Callable[[Sequence[Floats]], "Floats | None"]
"""Returns the mean of each sample, shape (samples, c), over all its rows in all calls; None where that fails."""


def _merge(whole: Sequence[Floats], half: Sequence[Floats], count: int) -> _Merge:
    """Return how the rows of a layer belong to samples, by a pass over a batch and one over its first half."""
    for axis in (0, 1):
        by_sample = partial(_by_sample, count=count, axis=axis)
        means, of_half = by_sample(whole), _by_sample(half, count=max(count // 2, 1), axis=axis)
        if means is None or of_half is None or len(whole) != len(half):
            break
        has_one_row = all(len(call) == count for call in whole)
        difference = np.abs(means[: len(of_half)] - of_half).max(0)
        if has_one_row or bool((difference <= _SAME_ROWS * means.std(0) + 1e-12).all()):
            return by_sample
    return lambda _: None


def _by_sample(calls: Sequence[Floats], *, count: int, axis: int) -> Floats | None:
    """Return the mean of each sample over its rows and calls. `axis` is 0 if the rows of a sample are together."""
    if not calls or any(len(call) % count or not len(call) for call in calls):
        return None
    shape = (count, -1) if axis == 0 else (-1, count)
    means = [call.reshape(*shape, call.shape[1]).mean(1 - axis) for call in calls]
    return np.asarray(np.mean(means, 0), dtype=np.float64)


class _Recorder:
    """Takes the input of one layer, and keeps the mean of each row in some channels.

    Attributes:
        resolution: See :class:`SampleMeans`.
    """

    def __init__(self, layer: nn.Module, seen: Observed) -> None:
        self._channels = channels_of(layer)
        places = spread_channels(self._channels)
        self._places = torch.from_numpy(places)
        self.resolution = _RESOLUTION * np.sqrt(seen.mean**2 + seen.var)[places]
        self._calls: list[Tensor] = []

    def take(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keep the input of one call; rows in another place than axis 0 are no rows."""
        x = input_of(arguments, keywords)
        if x.dim() < 2 or x.size(1) != self._channels:
            self._calls.append(torch.empty((0, len(self._places)), dtype=torch.float64))
            return
        if self._places.device != x.device:
            self._places = self._places.to(x.device)
        few = x.index_select(1, self._places).flatten(2) if x.dim() > 2 else x[:, self._places, None]
        self._calls.append(few.mean(2, dtype=widened(few[:0]).dtype))

    def taken(self) -> list[Tensor]:
        """Return the calls since this was last called."""
        calls, self._calls = self._calls, []
        return calls


def _fit_together(batches: Sequence[Batch]) -> bool:
    """Return whether samples of all batches have the same shapes, so that they could be in one batch."""
    sizes = [samples_in(batch) for batch in batches]
    return all(sizes) and bool(columns_of([input_of_batch(batch) for batch in batches], sizes))


def _drawn(batch: Batch, count: int, generator: torch.Generator) -> Batch:
    """Return a batch of so many of its samples. A whole batch keeps their order."""
    size = samples_in(batch)
    return batch if size <= count else samples_at(batch, torch.randperm(size, generator=generator)[:count])
