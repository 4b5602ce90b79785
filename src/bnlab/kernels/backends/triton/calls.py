"""The operators of the GPU kernels, with the arguments and results of `bnlab.kernels.native.calls`.

Nothing here waits for the device. A batch is normalised in one launch if the tiles of a channel group fit into
registers, and in two launches otherwise, or three where a channel has many parts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bnlab.errors import UsageError
from bnlab.kernels.backends.triton.availability import machine_of
from bnlab.kernels.backends.triton.geometry import Geometry, TileForm, geometry_of, merging_form
from bnlab.kernels.backends.triton.launching import compiled, is_too_large, launch, on_device_of, pair
from bnlab.kernels.backends.triton.plan import Machine, Split, Teams, split, teams, teams_form
from bnlab.kernels.backends.triton.workspace import counters
from bnlab.kernels.form import Form, Running

__all__ = ["apply", "backward", "statistics", "train"]

_pair = lru_cache(maxsize=256)(pair)

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "skipped_batches")

_PLANS: dict[tuple[Any, ...], Teams | str] = {}
"""How each kernel shares out the tensors of a kind in one launch, or the reason for two."""

_REMEMBERED = 4096


def train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    running: Running = Running(),  # noqa: B008 - a tuple never changes
    momentum: float = 0.0,
    skip_nonfinite: bool = False,
    want_bits: bool = False,
    room: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Normalise with batch statistics, add the residual, activate, and update the running statistics.

    For arguments and results see :func:`bnlab.kernels.native.calls.train`. The status is always 0: the device alone
    knows whether the batch was skipped.
    """
    geometry = geometry_of(x, machine_of(x.device).tile)
    y, moments = torch.empty_like(x), _moments(x)
    bits = _bits(x, geometry, want_bits and residual is not None, room)
    if not geometry.elements:
        return y, moments.zero_(), bits, 0
    numbers = (*_pair(form.eps), *_pair(momentum), form.slope)
    dense = Running(*(_vector(name, values, x) for name, values in zip(_BUFFERS, running, strict=True)))
    ends = (dense.mean, dense.var, dense.batches, dense.skipped)
    tensors = (x, residual, y, _or_none(bits), _vector("weight", weight, x), _vector("bias", bias, x), moments)
    with on_device_of(x):
        if not _train_at_once(geometry, machine_of(x.device), tensors, ends, numbers, form, skip_nonfinite):
            parts, notes, plan, number = _parts_of_statistics(x, None, geometry, dense)
            _normalise(geometry, plan, tensors, parts, notes, None, ends, number, numbers, form, skip_nonfinite)
    for buffer, changed in zip(running, dense, strict=True):
        if buffer is not None and changed is not None and changed is not buffer:
            buffer.copy_(changed)
    return y, moments, bits, 0


def apply(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    want_bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with fixed statistics. For arguments and results see :func:`bnlab.kernels.native.calls.apply`."""
    geometry = geometry_of(x, machine_of(x.device).tile)
    y, moments = torch.empty_like(x), _moments(x)
    bits = _bits(x, geometry, want_bits and residual is not None, 0)
    if not geometry.elements:
        return y, torch.stack([mean.double(), var.double()], out=moments), bits
    tensors = (x, residual, y, _or_none(bits), _vector("weight", weight, x), _vector("bias", bias, x), moments)
    fixed = (_vector("running_mean", mean, x), _vector("running_var", var, x))
    numbers = (*_pair(form.eps), 0.0, 0.0, form.slope)
    nothing = (None, None, None, None)
    with on_device_of(x):
        plan = split(geometry, machine_of(x.device))
        _normalise(geometry, plan, tensors, None, None, fixed, nothing, 1, numbers, form, False)
    return y, moments, bits


def backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    weights: Tensor | None = None,
    bits: Tensor | None = None,
    want_dx: bool = True,
    want_dresidual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight and bias.

    For arguments and results see :func:`bnlab.kernels.native.calls.backward`.
    """
    geometry = geometry_of(x, machine_of(x.device).tile)
    dx = torch.empty_like(x) if want_dx else None
    dresidual = torch.empty_like(x) if want_dresidual and form.activation else None
    dweight, dbias = (
        torch.zeros(geometry.channels, dtype=_gradient_dtype(parameter), device=x.device)
        if not geometry.elements
        else torch.empty(geometry.channels, dtype=_gradient_dtype(parameter), device=x.device)
        for parameter in (weight, bias)
    )
    results = (dx, dresidual, dweight, dbias)
    if geometry.elements:
        tensors = (dy, x, bits, moments.contiguous(), _vector("weight", weight, x), _vector("bias", bias, x))
        with on_device_of(x):
            if not form.by_batch:
                _backward_of_fixed(geometry, tensors, results, form)
            elif weights is not None or not _backward_at_once(geometry, machine_of(x.device), tensors, results, form):
                _backward_in_two(geometry, tensors, weights, results, form)
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, nothing if dresidual is None else dresidual, dweight, dbias


def statistics(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, shape (2, C), float64, and the sum of the weights, shape (), float64.

    Args:
        x: Shape (N, C, *spatial), dense, of one of `native.DTYPES`.
        weights: Weight of every position, shape (N, positions), float32, or None.
    """
    geometry = geometry_of(x, machine_of(x.device).tile)
    moments, total = _moments(x), torch.zeros((), dtype=torch.float64, device=x.device)
    if not geometry.elements:
        return moments.zero_(), total
    with on_device_of(x):
        machine = machine_of(x.device)
        plan = split(geometry, machine)
        parts = _float64(x, 3 * plan.number * geometry.channels)
        _launch_statistics(x, weights, parts, None, None, geometry, plan)
        _launch_merge(parts, None, moments, total, geometry.channels, plan.number)
    return moments, total


def _train_at_once(
    geometry: Geometry,
    machine: Machine,
    tensors: tuple[Tensor | None, ...],
    ends: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    form: Form,
    skips: bool,
) -> bool:
    """Run everything in one launch if the tensor fits. Return whether it did."""
    from bnlab.kernels.backends.triton.device.forward import train_kernel

    x, residual, y, bits, weight, bias, moments = tensors

    def arguments(plan: Teams, parts: Tensor | None, zeros: Tensor | None) -> tuple[Any, ...]:
        return (
            *(x, residual, y, bits, parts, zeros, moments, weight, bias, *ends),
            *(geometry.rows, geometry.channels, geometry.groups, plan.number, plan.teams),
            *(geometry.count, *numbers),
            *(plan.form, form.activation, skips, plan.is_alone),
        )

    tiles = teams_form(geometry, machine)
    kinds = (form.activation, skips, *_kinds(*tensors, *ends))
    return _at_once(train_kernel, geometry, moments, arguments, tiles, 3, ends[0] is not None, kinds)


def _backward_at_once(
    geometry: Geometry,
    machine: Machine,
    tensors: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    form: Form,
) -> bool:
    """Compute all gradients in one launch if the tensors fit. Return whether they did."""
    from bnlab.kernels.backends.triton.device.gradient import backward_kernel

    dy, x, bits, moments, weight, bias = tensors

    def arguments(plan: Teams, parts: Tensor | None, zeros: Tensor | None) -> tuple[Any, ...]:
        return (
            *(dy, x, bits, moments, weight, bias, parts, zeros, *results),
            *(geometry.rows, geometry.channels, geometry.groups, plan.number, plan.teams),
            *(geometry.count, *_pair(form.eps), form.slope),
            *(plan.form, form.activation, plan.is_alone),
        )

    tiles = teams_form(geometry, machine, 2)
    kinds = (form.activation, *_kinds(*tensors, *results))
    return _at_once(backward_kernel, geometry, moments, arguments, tiles, 2, False, kinds)


def _at_once(
    kernel: Any,  # noqa: ANN401
    geometry: Geometry,
    like: Tensor | None,
    arguments: Any,  # noqa: ANN401
    form: TileForm,
    quantities: int,
    counts_groups: bool,
    kinds: tuple[object, ...],
) -> bool:
    """Launch a kernel of teams if the machine holds a team. Return whether it does."""
    if like is None:
        raise AssertionError("the moments are always there")
    key = (kernel, geometry, form, like.device, kinds)
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= _REMEMBERED:  # batches of ever new sizes
            _PLANS.clear()
        machine = machine_of(like.device)
        plan = teams(geometry, form, machine, None, False)
        if not isinstance(plan, Teams):
            plan = _teams_by_registers(kernel, geometry, like, arguments, form, quantities, machine)
        _PLANS[key] = plan
    if not isinstance(plan, Teams):
        return False
    parts = None if plan.is_alone else _float64(like, quantities * plan.number * geometry.channels)
    zeros = counters(like.device, 2 * plan.teams + 1) if counts_groups or not plan.is_alone else None
    programs = plan.number * plan.teams
    try:
        launch(kernel, programs, arguments(plan, parts, zeros), cooperative=not plan.is_alone)
    except RuntimeError as error:
        if plan.is_alone or not is_too_large(error):
            raise
        _PLANS[key] = "the device did not hold its programs"  # another process or a limit takes a part of it
        return False
    return True


def _teams_by_registers(
    kernel: Any,  # noqa: ANN401
    geometry: Geometry,
    like: Tensor,
    arguments: Any,  # noqa: ANN401
    form: TileForm,
    quantities: int,
    machine: Machine,
) -> Teams | str:
    """Compile a kernel of teams that wait, and return its plan by the registers that the compiler reports."""
    number = -(-geometry.rows // (form.height * form.tiles))
    if not machine.cooperative or number > machine.resident(1):
        return "the machine holds no team"
    trial = Teams(form, number, max(2, geometry.groups))
    zeros = torch.empty(1, dtype=torch.int32, device=like.device)  # only compiled for, so that nothing fills it
    sample = arguments(trial, _float64(like, quantities), zeros)
    binary = compiled(kernel, sample, cooperative=True)
    return teams(geometry, form, machine, binary.registers, binary.spills)


def _parts_of_statistics(
    x: Tensor, weights: Tensor | None, geometry: Geometry, running: Running
) -> tuple[Tensor, Tensor | None, Split, int]:
    """Launch the statistics. Return the parts, the notes, the plan, and the number of parts of a channel."""
    plan = split(geometry, machine_of(x.device))
    channels, number = geometry.channels, plan.number
    parts = _float64(x, 3 * number * channels)
    notes = None if running.mean is None else _float64(x, number * geometry.groups + 1)
    _launch_statistics(x, weights, parts, notes, running.batches, geometry, plan)
    if plan.merges:
        whole = _float64(x, 3 * channels)
        _launch_merge(parts, whole, None, None, channels, number)
        return whole, notes, plan, 1
    return parts, notes, plan, number


def _launch_statistics(
    x: Tensor,
    weights: Tensor | None,
    parts: Tensor,
    notes: Tensor | None,
    batches: Tensor | None,
    geometry: Geometry,
    plan: Split,
) -> None:
    from bnlab.kernels.backends.triton.device.statistics import statistics_kernel

    launch(
        statistics_kernel,
        plan.number * geometry.groups,
        (
            *(x, weights, parts, notes, batches),
            *(geometry.rows, geometry.channels, plan.chunk, plan.number, plan.form),
        ),
    )


def _launch_merge(
    parts: Tensor, whole: Tensor | None, moments: Tensor | None, total: Tensor | None, channels: int, number: int
) -> None:
    from bnlab.kernels.backends.triton.device.statistics import merge_kernel

    form = merging_form(machine_of(parts.device).tile)
    launch(merge_kernel, -(-channels // form.side), (parts, whole, moments, total, channels, number, form))


def _normalise(
    geometry: Geometry,
    plan: Split,
    tensors: tuple[Tensor | None, ...],
    parts: Tensor | None,
    notes: Tensor | None,
    fixed: tuple[Tensor | None, Tensor | None] | None,
    ends: tuple[Tensor | None, ...],
    number_of_parts: int,
    numbers: tuple[float, ...],
    form: Form,
    skips: bool,
) -> None:
    from bnlab.kernels.backends.triton.device.forward import normalise_kernel

    x, residual, y, bits, weight, bias, moments = tensors
    launch(
        normalise_kernel,
        plan.number * geometry.groups,
        (
            *(x, residual, y, bits, parts, notes, *(fixed or (None, None)), moments, weight, bias, *ends),
            *(geometry.rows, geometry.channels, plan.chunk, plan.number, number_of_parts),
            *(plan.number * geometry.groups, *numbers),
            *(plan.form, form.activation, skips),
        ),
    )


def _backward_of_fixed(
    geometry: Geometry, tensors: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...], form: Form
) -> None:
    """Compute the gradients under fixed statistics in one pass, and add up those of the parameters."""
    dx, dresidual, dweight, dbias = results
    parts, plan = _launch_sums(geometry, tensors, None, (dx, dresidual), form)
    _launch_merge_of_sums(geometry, tensors, parts, plan.number, None, (dweight, dbias), 2, form)


def _backward_in_two(
    geometry: Geometry,
    tensors: tuple[Tensor | None, ...],
    weights: Tensor | None,
    results: tuple[Tensor | None, ...],
    form: Form,
) -> None:
    """Compute the gradients through batch statistics: the sums, then dx."""
    from bnlab.kernels.backends.triton.device.gradient import gradient_kernel

    dx, dresidual, dweight, dbias = results
    parts, plan = _launch_sums(geometry, tensors, weights, (None, None), form)
    quantities, number = 2 if weights is None else 3, plan.number
    only_sums = dx is None and dresidual is None
    if plan.merges or only_sums:
        whole = None if only_sums else _float64(parts, quantities * geometry.channels)
        ends = (dweight, dbias) if only_sums else (None, None)
        _launch_merge_of_sums(geometry, tensors, parts, number, whole, ends, quantities, form)
        if whole is None:
            return
        parts, number = whole, 1
    dy, x, bits, moments, weight, bias = tensors
    launch(
        gradient_kernel,
        plan.number * geometry.groups,
        (
            *(dy, x, bits, weights, moments, weight, bias, parts, dx, dresidual, dweight, dbias),
            *(geometry.rows, geometry.channels, plan.chunk, plan.number, number, geometry.count),
            *(*_pair(form.eps), form.slope, plan.form, form.activation),
        ),
    )


def _launch_sums(
    geometry: Geometry,
    tensors: tuple[Tensor | None, ...],
    weights: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None],
    form: Form,
) -> tuple[Tensor, Split]:
    """Launch the sums of the gradients. Return their parts and the plan."""
    from bnlab.kernels.backends.triton.device.gradient import gradient_sums_kernel

    dy, x, bits, moments, weight, bias = tensors
    if x is None:
        raise AssertionError("the input is always there")
    plan = split(geometry, machine_of(x.device), 2)
    parts = _float64(x, (2 if weights is None else 3) * plan.number * geometry.channels)
    launch(
        gradient_sums_kernel,
        plan.number * geometry.groups,
        (
            *(dy, x, bits, weights, moments, weight, bias, parts, *gradients),
            *(geometry.rows, geometry.channels, plan.chunk, plan.number),
            *(*_pair(form.eps), form.slope, plan.form, form.activation),
        ),
    )
    return parts, plan


def _launch_merge_of_sums(
    geometry: Geometry,
    tensors: tuple[Tensor | None, ...],
    parts: Tensor,
    number: int,
    whole: Tensor | None,
    ends: tuple[Tensor | None, Tensor | None],
    quantities: int,
    form: Form,
) -> None:
    from bnlab.kernels.backends.triton.device.gradient import merge_sums_kernel

    _, _, _, moments, weight, bias = tensors
    merging = merging_form(machine_of(parts.device).tile)
    launch(
        merge_sums_kernel,
        -(-geometry.channels // merging.side),
        (
            *(parts, whole, moments, weight, bias, *ends, geometry.channels, number, *_pair(form.eps)),
            *(quantities, merging),
        ),
    )


def _vector(name: str, values: Tensor | None, x: Tensor) -> Tensor | None:
    """Return values as the kernels read them, side by side in memory, on the device of the input.

    Raises:
        UsageError: If they lie on another device.
    """
    if values is None:
        return None
    if values.get_device() != x.get_device():
        rule = f"{name} must be on {x.device} as the input is, got {values.device}"
        raise UsageError(f"batch norm: {rule}. Move the layer: layer.to({str(x.device)!r}).")
    return values if values.is_contiguous() else values.contiguous()


def _kinds(*tensors: Tensor | None) -> tuple[object, ...]:
    """Return what the compiled code depends on besides sizes: which tensors are there, and their dtypes."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _moments(x: Tensor) -> Tensor:
    return torch.empty((2, x.size(1)), dtype=torch.float64, device=x.device)


def _float64(like: Tensor, elements: int) -> Tensor:
    return torch.empty(elements, dtype=torch.float64, device=like.device)


def _bits(x: Tensor, geometry: Geometry, wanted: bool, room: int) -> Tensor:
    size = max(room, geometry.bytes_for_bits) if wanted else 0
    make = torch.zeros if size > geometry.bytes_for_bits else torch.empty  # bytes that no kernel writes are 0
    return make(size, dtype=torch.uint8, device=x.device)


def _or_none(bits: Tensor) -> Tensor | None:
    return bits if bits.numel() else None


def _gradient_dtype(parameter: Tensor | None) -> torch.dtype:
    return torch.float32 if parameter is None else parameter.dtype
