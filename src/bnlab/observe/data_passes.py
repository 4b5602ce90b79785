"""Runs a model over data sets with every BN layer on batch statistics, and groups samples into batches where needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bnlab.conventions import FEW_VALUES
from bnlab.errors import UsageError
from bnlab.observe.between_batches import between_batches
from bnlab.observe.model_evidence import BetweenBatches, Observed
from bnlab.observe.passes.batches import input_of_batch, samples_in, shuffled_batches
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.kept_batches import KeptBatches
from bnlab.observe.passes.layer_statistics import OneValueInEachBatch, observe
from bnlab.observe.passes.regroup import regrouped
from bnlab.observe.passes.sample_means import SampleMeans, sample_means
from bnlab.observe.passes.subject import ForwardFailed, Subject, usage_error_unless
from bnlab.observe.passes.tensors import tensors_in
from bnlab.wording import counted

__all__ = ["NOTHING", "CommonCount", "DataPass", "DataPasses", "require_finite"]

NOTHING: Mapping[str, Observed] = {}

_OTHER_SIZE = 1.25
"""Ratio of batch sizes above which the sizes count as different."""


@dataclass(frozen=True)
class DataPass:
    """The inputs of every layer over a data set.

    Attributes:
        seen: The inputs of every layer that ran on a finite batch, by path.
        usable: The batches with more than one value per channel.
        finite: Those of them in which no layer gets a NaN or inf.
    """

    seen: Mapping[str, Observed]
    usable: KeptBatches
    finite: KeptBatches


@dataclass(frozen=True)
class CommonCount:
    """The inputs of every layer over two data sets in batches of a common size.

    Attributes:
        data: Over the evaluation data; empty where their batches are large enough as they are.
        train_data: Over the training data, likewise.
        possible: Whether the samples can be joined into batches of a common size, where that is needed.
    """

    data: Mapping[str, Observed] = field(default_factory=dict)
    train_data: Mapping[str, Observed] = field(default_factory=dict)
    possible: bool = True


@dataclass
class DataPasses:
    """Runs a model over data sets, and records in `notes` which batches could not be used.

    Attributes:
        subject: The model.
        modules: Its layers by path.
        advance: Called after every batch with the name of the current step.
        notes: What a user must know of the batches.
    """

    subject: Subject
    modules: Mapping[str, nn.Module]
    advance: Callable[[str], None]
    notes: list[str] = field(default_factory=list)

    def over(self, label: str, data: KeptBatches) -> DataPass:
        """Return the inputs of every layer over a data set.

        Raises:
            OneValueInEachBatch: If every batch leaves one value per channel in a layer.
            UsageError: If forward raises.
        """
        described = data.described()
        short: set[int] = set()
        not_finite: set[int] = set()
        seen = self._observed(label, data.everything, skipped=short, not_finite=not_finite)
        if described is not None:
            self.notes.append(f"{label}: from {described}")
        if not_finite:
            batches_were = counted(len(not_finite), "batch was", "batches were")
            self.notes.append(f"{label}: {batches_were} left out of every layer that gets a NaN or inf")
        finite = data.without(short | not_finite) if short | not_finite else data
        if not short:
            return DataPass(seen, data, finite)
        batches_were = counted(len(short), "batch was", "batches were")
        self.notes.append(f"{label}: {batches_were} left out: one value per channel has no variance")
        return DataPass(seen, data.without(short), finite)

    def over_joined(self, label: str, data: KeptBatches) -> DataPass:
        """Return the inputs of every layer; join batches whose samples leave one value per channel.

        Raises:
            OneValueInEachBatch: If the batches cannot be joined, or if that does not help.
            UsageError: If forward raises.
        """
        try:
            return self.over(label, data)
        except OneValueInEachBatch:
            joined = regrouped(data, FEW_VALUES)
            if joined is None or len(joined) == len(data):
                raise
            of_joined = self.over(label, joined)
        size = samples_in(next(iter(data)))
        self.notes.append(
            f"{label}: its {counted(len(data), 'batch', 'batches')} of {counted(size, 'sample')} were joined into "
            f"{counted(len(joined), 'batch', 'batches')}, because one value per channel has no variance"
        )
        return of_joined

    def over_shuffled(self, label: str, data: KeptBatches) -> Mapping[str, Observed]:
        """Return the inputs of every layer over shuffled samples; an empty mapping if they cannot be shuffled."""
        with suppress(UsageError):
            return self._observed(f"shuffled {label}", shuffled_batches(data, self.subject.inputs_taken(data)))
        return NOTHING

    def between_batches(self, label: str, of: DataPass | None) -> Mapping[str, BetweenBatches]:
        """Return how much the inputs of every layer differ between batches, where their samples can be compared."""
        means: Mapping[str, SampleMeans] = {}
        if of is None:
            return {}
        with suppress(UsageError), usage_error_unless(f"forward must run on samples of {label}", ForwardFailed):
            means = sample_means(
                self.subject,
                self.modules,
                of.finite,
                of.seen,
                advance=lambda: self.advance(f"observing samples of {label}"),
            )
        return {path: between_batches(each.batches, each.sizes, each.resolution) for path, each in means.items()}

    def over_dropping(self, label: str, data: KeptBatches, dropping: Collection[str]) -> Mapping[str, Observed]:
        """Return the inputs of every layer with dropout on; an empty mapping if the model does not run that way."""
        try:
            return self._observed(label, data.everything, dropping=dropping)
        except UsageError as error:
            self.notes.append(f"{label}: left out because of an error: {str(error).rstrip('.')}")
            return NOTHING

    def at_common_count(self, data: DataPass, train_data: DataPass) -> CommonCount:
        """Return the inputs of both data sets in batches of a common size, where either has few values per channel.

        Statistics behind a layer depend on the noise of its batch statistics, and so on the size of the batches. The
        samples of the data set with the smaller batches are joined.
        """
        sizes = [_mean_samples(of.usable) for of in (data, train_data)]
        if min(sizes) <= 0 or max(sizes) <= _OTHER_SIZE * min(sizes) or not _has_few_values(data, train_data):
            return CommonCount()
        joins_data = sizes[0] < sizes[1]
        smaller, label = (data, "data") if joins_data else (train_data, "train_data")
        joined = regrouped(smaller.finite, round(max(sizes)))
        if joined is None:
            return CommonCount(possible=False)
        try:
            seen = self._observed(f"{label} in larger batches", joined)
        except UsageError:
            return CommonCount(possible=False)
        return CommonCount(data=seen) if joins_data else CommonCount(train_data=seen)

    def _observed(self, label: str, data: Iterable[Batch], **options: Any) -> dict[str, Observed]:  # noqa: ANN401
        with usage_error_unless(f"forward must run on every batch of {label}", ForwardFailed):
            return observe(
                self.subject, self.modules, data, advance=lambda: self.advance(f"observing {label}"), **options
            )


def require_finite(name: str, data: KeptBatches) -> None:
    """Refuse data of which every batch holds a NaN or inf in its input.

    Raises:
        ForwardFailed: If no batch is finite.
    """
    if len(data) and not any(_is_finite(batch) for batch in data):
        raise ForwardFailed(
            f"{name}: its inputs must be finite, got NaN or inf in each of {len(data):,} batches. Look for them in the "
            "loader."
        )


def _is_finite(batch: Batch) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_in(input_of_batch(batch)) if t.is_floating_point())


def _mean_samples(data: KeptBatches) -> float:
    sizes = [samples_in(batch) for batch in data]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _has_few_values(*passes: DataPass) -> bool:
    return any(seen.count < FEW_VALUES * seen.batches for one in passes for seen in one.seen.values())
