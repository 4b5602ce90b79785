"""Says in a receipt how exact recalibrated statistics are, and why a pass over the data ended."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bnlab.observe.passes.pooling import End, Estimator, Pooling
from bnlab.observe.standard_errors import StandardError
from bnlab.wording import counted

__all__ = ["passes_note", "source_note", "why_not_reached"]

_TARGET_STANDARD_ERROR = 0.03
"""A standard error that is small enough: that of 1,000 independent samples.

With 1,000 samples, Wu and Johnson 2021 (arXiv:2105.07576), table 1, lose 0.03 %.
"""

_ENDINGS = {End.DATA: "the data end", End.LIMIT: "max_batches ends the pass", End.REACHED: "the pass stops"}


def source_note(pooling: Pooling, estimator: Estimator, wanted: float | None) -> str:
    """Return the note that says from how many batches the statistics come, and how exact they are.

    Args:
        pooling: The result of the pass, or of the passes of a layer-wise recalibration together.
        estimator: The variance that is stored.
        wanted: The standard error that the user wants, in standard deviations; None where the user names none.
    """
    source = _source(pooling)
    why_unknown = _why_unknown(pooling, estimator, wanted)
    if why_unknown is not None:
        return f"{source}: {why_unknown}"
    path, error = _worst(pooling, estimator)
    if wanted is None:
        needed = _samples_needed(pooling, error, _TARGET_STANDARD_ERROR)
        return f"{source}; {needed} are enough for a standard error of {_TARGET_STANDARD_ERROR} std"
    text = (
        f"{source}: {_ENDINGS[pooling.end]} at a standard error of {error.value:.2g} std, {wanted:g} std wanted "
        f"(largest for the {error.of} of channel {error.channel} in {path or 'the model itself'})"
    )
    if pooling.end is End.REACHED:
        return text
    return f"{text}; {_samples_needed(pooling, error, wanted)} are enough"


def why_not_reached(pooling: Pooling, estimator: Estimator, wanted: float | None) -> str | None:
    """Return the warning that the data end before the wanted standard error is reached; None where there is none."""
    if wanted is None or pooling.end is not End.DATA:
        return None
    why_unknown = _why_unknown(pooling, estimator, wanted)
    batches = counted(pooling.batches, "batch", "batches", separator=",")
    if why_unknown is not None:
        way_out = "Shuffle them, or" if pooling.order is not None else "Pass more data, or"
        value = f"none after {batches}: {why_unknown}"
    else:
        _, error = _worst(pooling, estimator)
        value = f"{error.value:.2g} after {batches}, all that there are"
        way_out = f"Pass {_samples_needed(pooling, error, wanted)}, or"
    return (
        f"batches: their standard error must be at most standard_error={wanted:g} before they end, got {value}. "
        f"{way_out} leave standard_error out: the statistics of all batches are stored."
    )


def passes_note(pooling: Pooling) -> str | None:
    """Return the note on how many batches each layer read, where a layer-wise recalibration read different numbers."""
    numbers = [pooled.errors.batches for pooled in pooling.layers.values() if pooled.errors is not None]
    if not numbers or min(numbers) == max(numbers):
        return None
    return f"one pass for each layer, over {min(numbers):,} to {max(numbers):,} batches"


def _source(pooling: Pooling) -> str:
    batches = counted(pooling.batches, "batch", "batches", separator=",")
    return f"from {batches}, {counted(pooling.samples, 'sample', separator=',')}"


def _why_unknown(pooling: Pooling, estimator: Estimator, wanted: float | None) -> str | None:
    """Return why the standard error is not known, as a clause; None where it is."""
    if pooling.order is not None:
        return f"{pooling.order}, so that the standard error is not known"
    errors = pooling.standard_errors(estimator)
    without = [path for path in pooling.layers if path not in errors]
    if not errors:
        return f"{'one batch is' if pooling.batches == 1 else 'the batches are'} too few to estimate a standard error"
    if without and wanted is not None:
        return f"{_listed(without)} in too few batches to estimate a standard error"
    return None


def _listed(paths: Iterable[str]) -> str:
    first, *rest = paths
    return f"{first} and {counted(len(rest), 'other layer')} ran" if rest else f"{first} ran"


def _worst(pooling: Pooling, estimator: Estimator) -> tuple[str, StandardError]:
    return max(pooling.standard_errors(estimator).items(), key=lambda item: item[1].value)


def _samples_needed(pooling: Pooling, error: StandardError, wanted: float) -> str:
    needed = math.ceil(pooling.samples * (error.value / wanted) ** 2)
    return counted(needed, "sample", separator=",")
