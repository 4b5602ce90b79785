"""Two launches: sums over parts of every channel, then the transform. A third merges the parts where they are many."""

from __future__ import annotations

from torch import Tensor

from bnlab.kernels.backends.triton import availability, launching
from bnlab.kernels.backends.triton.geometry import Geometry, merging_form
from bnlab.kernels.backends.triton.plan import Split, split
from bnlab.kernels.backends.triton.tensors import (
    ForwardTensors,
    Gradients,
    IncomingTensors,
    Update,
    float64_scratch,
    numbers_of,
    pair_of,
)
from bnlab.kernels.form import Form

__all__ = ["backward_in_two", "backward_of_fixed", "normalise_with", "statistics_of", "train_in_two"]

_FEW_TILES = 2
"""Tiles of each of two tensors that a program reads before it uses them."""


def train_in_two(geometry: Geometry, tensors: ForwardTensors, update: Update, form: Form) -> None:
    """Normalise by the batch, and update the running statistics."""
    from bnlab.kernels.backends.triton.device.forward import normalise_kernel

    x, residual, y, bits, weight, bias, moments = tensors
    shares = _split(geometry, x)
    number, channels, programs = shares.number, geometry.channels, shares.number * geometry.groups
    parts = float64_scratch(x, 3 * number * channels)
    notes = None if update.running.mean is None else float64_scratch(x, programs + 1)
    _launch_statistics(geometry, shares, x, None, parts, notes, update.running.batches)
    if shares.merges:
        whole = float64_scratch(x, 3 * channels)
        _launch_merge(parts, whole, None, None, channels, number)
        parts, number = whole, 1
    eps_high, eps_low, slope = numbers_of(form)
    launching.launch(
        normalise_kernel,
        programs,
        (
            *(x, residual, y, bits, parts, notes, None, None, moments, weight, bias, *update.running),
            *(geometry.rows, channels, shares.chunk, shares.number, number, programs),
            *(eps_high, eps_low, *pair_of(update.momentum), slope, shares.form, form.activation, update.skips),
        ),
    )


def normalise_with(
    mean: Tensor | None, var: Tensor | None, geometry: Geometry, tensors: ForwardTensors, form: Form
) -> None:
    """Normalise with fixed statistics of shape (C,), in one launch."""
    from bnlab.kernels.backends.triton.device.forward import normalise_kernel

    x, residual, y, bits, weight, bias, moments = tensors
    shares = _split(geometry, x)
    programs = shares.number * geometry.groups
    eps_high, eps_low, slope = numbers_of(form)
    launching.launch(
        normalise_kernel,
        programs,
        (
            *(x, residual, y, bits, None, None, mean, var, moments, weight, bias, None, None, None, None),
            *(geometry.rows, geometry.channels, shares.chunk, shares.number, 1, programs),
            *(eps_high, eps_low, 0.0, 0.0, slope, shares.form, form.activation, False),
        ),
    )


def statistics_of(geometry: Geometry, x: Tensor, weights: Tensor | None, moments: Tensor, total: Tensor) -> None:
    """Store mean and biased variance in `moments`, shape (2, C), and the sum of the weights in `total`, float64."""
    shares = _split(geometry, x)
    parts = float64_scratch(x, 3 * shares.number * geometry.channels)
    _launch_statistics(geometry, shares, x, weights, parts, None, None)
    _launch_merge(parts, None, moments, total, geometry.channels, shares.number)


def backward_of_fixed(geometry: Geometry, tensors: IncomingTensors, results: Gradients, form: Form) -> None:
    """Compute the gradients under fixed statistics in one pass, and add up those of the parameters."""
    parts, shares = _launch_sums(geometry, tensors, results.dx, results.dresidual, form)
    _launch_merge_of_sums(geometry, tensors, parts, shares.number, None, results, 2, form)


def backward_in_two(geometry: Geometry, tensors: IncomingTensors, results: Gradients, form: Form) -> None:
    """Compute the gradients through batch statistics: the sums, then dx."""
    from bnlab.kernels.backends.triton.device.gradient import gradient_kernel

    parts, shares = _launch_sums(geometry, tensors, None, None, form)
    quantities, number = 2 if tensors.weights is None else 3, shares.number
    if results.dx is None and results.dresidual is None:
        _launch_merge_of_sums(geometry, tensors, parts, number, None, results, quantities, form)
        return
    if shares.merges:
        whole = float64_scratch(parts, quantities * geometry.channels)
        nothing = Gradients(None, None, None, None)
        _launch_merge_of_sums(geometry, tensors, parts, number, whole, nothing, quantities, form)
        parts, number = whole, 1
    launching.launch(
        gradient_kernel,
        shares.number * geometry.groups,
        (
            *(*tensors, parts, *results),
            *(geometry.rows, geometry.channels, shares.chunk, shares.number, number, geometry.count),
            *(*numbers_of(form), shares.form, form.activation),
        ),
    )


def _split(geometry: Geometry, x: Tensor) -> Split:
    return split(geometry, availability.machine_of(x.device))


def _launch_statistics(
    geometry: Geometry,
    shares: Split,
    x: Tensor,
    weights: Tensor | None,
    parts: Tensor,
    notes: Tensor | None,
    batches: Tensor | None,
) -> None:
    from bnlab.kernels.backends.triton.device.statistics import statistics_kernel

    launching.launch(
        statistics_kernel,
        shares.number * geometry.groups,
        (
            *(x, weights, parts, notes, batches),
            *(geometry.rows, geometry.channels, shares.chunk, shares.number, shares.form),
        ),
    )


def _launch_merge(
    parts: Tensor, whole: Tensor | None, moments: Tensor | None, total: Tensor | None, channels: int, number: int
) -> None:
    from bnlab.kernels.backends.triton.device.statistics import merge_kernel

    form = merging_form(availability.machine_of(parts.device).tile)
    launching.launch(merge_kernel, -(-channels // form.side), (parts, whole, moments, total, channels, number, form))


def _launch_sums(
    geometry: Geometry, tensors: IncomingTensors, dx: Tensor | None, dresidual: Tensor | None, form: Form
) -> tuple[Tensor, Split]:
    """Launch the sums of the gradients, and dx and dresidual of fixed statistics. Return the parts, and their plan."""
    from bnlab.kernels.backends.triton.device.gradient import gradient_sums_kernel

    x = tensors.x
    shares = split(geometry, availability.machine_of(x.device), _FEW_TILES)
    parts = float64_scratch(x, (2 if tensors.weights is None else 3) * shares.number * geometry.channels)
    launching.launch(
        gradient_sums_kernel,
        shares.number * geometry.groups,
        (
            *(*tensors, parts, dx, dresidual),
            *(geometry.rows, geometry.channels, shares.chunk, shares.number),
            *(*numbers_of(form), shares.form, form.activation),
        ),
    )
    return parts, shares


def _launch_merge_of_sums(
    geometry: Geometry,
    tensors: IncomingTensors,
    parts: Tensor,
    number: int,
    whole: Tensor | None,
    results: Gradients,
    quantities: int,
    form: Form,
) -> None:
    from bnlab.kernels.backends.triton.device.gradient import merge_sums_kernel

    merging = merging_form(availability.machine_of(parts.device).tile)
    eps_high, eps_low, _ = numbers_of(form)
    launching.launch(
        merge_sums_kernel,
        -(-geometry.channels // merging.side),
        (
            *(parts, whole, tensors.moments, tensors.weight, tensors.bias, results.dweight, results.dbias),
            *(geometry.channels, number, eps_high, eps_low, quantities, merging),
        ),
    )
