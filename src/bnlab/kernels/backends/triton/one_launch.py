"""One launch: programs that share a group of channels keep their tiles in registers and wait for each other once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnlab.kernels.backends.triton import availability, launching, workspace
from bnlab.kernels.backends.triton.geometry import Geometry, TileForm
from bnlab.kernels.backends.triton.plan import Machine, Teams, teams, teams_form
from bnlab.kernels.backends.triton.tensors import (
    ForwardTensors,
    Gradients,
    IncomingTensors,
    Update,
    float64_scratch,
    kinds_of,
    numbers_of,
    pair_of,
)
from bnlab.kernels.form import Form

__all__ = ["backward_at_once", "train_at_once"]

_PLANS: dict[tuple[Any, ...], Teams | str] = {}
"""How each kernel shares out the tensors of a kind, or the reason for two launches."""

_REMEMBERED = 4096

_Arguments = Callable[[Teams, Tensor | None, Tensor | None], tuple[Any, ...]]
"""Returns the arguments of a kernel for its teams, the scratch for parts, and the counters."""


def train_at_once(geometry: Geometry, tensors: ForwardTensors, update: Update, form: Form) -> bool:
    """Normalise by the batch and update the running statistics in one launch. Return whether the tensor fits."""
    from bnlab.kernels.backends.triton.device.forward import train_kernel

    x, residual, y, bits, weight, bias, moments = tensors
    eps_high, eps_low, slope = numbers_of(form)

    def arguments(shares: Teams, parts: Tensor | None, counters: Tensor | None) -> tuple[Any, ...]:
        return (
            *(x, residual, y, bits, parts, counters, moments, weight, bias, *update.running),
            *(geometry.rows, geometry.channels, geometry.groups, shares.number, shares.teams, geometry.count),
            *(eps_high, eps_low, *pair_of(update.momentum), slope),
            *(shares.form, form.activation, update.skips, shares.is_alone),
        )

    machine = availability.machine_of(x.device)
    kinds = (form.activation, update.skips, *kinds_of(*tensors, *update.running))
    launch = _Launch(train_kernel, geometry, teams_form(geometry, machine), arguments, moments, 3)
    return launch.run(machine, kinds, needs_counters=update.running.mean is not None)


def backward_at_once(geometry: Geometry, tensors: IncomingTensors, results: Gradients, form: Form) -> bool:
    """Compute all gradients through batch statistics in one launch. Return whether the tensors fit."""
    from bnlab.kernels.backends.triton.device.gradient import backward_kernel

    dy, x, bits, _, moments, weight, bias = tensors

    def arguments(shares: Teams, parts: Tensor | None, counters: Tensor | None) -> tuple[Any, ...]:
        return (
            *(dy, x, bits, moments, weight, bias, parts, counters, *results),
            *(geometry.rows, geometry.channels, geometry.groups, shares.number, shares.teams, geometry.count),
            *(*numbers_of(form), shares.form, form.activation, shares.is_alone),
        )

    machine = availability.machine_of(x.device)
    kinds = (form.activation, *kinds_of(*tensors, *results))
    launch = _Launch(backward_kernel, geometry, teams_form(geometry, machine, 2), arguments, moments, 2)
    return launch.run(machine, kinds, needs_counters=False)


class _Launch:
    """A launch of a kernel of teams.

    Args:
        kernel: The kernel.
        geometry: How it sees its tensors.
        form: The form of its tiles.
        arguments: Returns its arguments.
        moments: A tensor on its device.
        quantities: Numbers that a program stores for every channel.
    """

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401 - a function of triton.jit
        geometry: Geometry,
        form: TileForm,
        arguments: _Arguments,
        moments: Tensor,
        quantities: int,
    ) -> None:
        self._kernel = kernel
        self._geometry = geometry
        self._form = form
        self._arguments = arguments
        self._moments = moments
        self._quantities = quantities

    def run(self, machine: Machine, kinds: tuple[object, ...], *, needs_counters: bool) -> bool:
        """Launch the kernel if the machine holds a team. Return whether it does.

        Args:
            machine: The machine behind the device.
            kinds: What the compiled code depends on besides sizes.
            needs_counters: Whether the kernel counts the groups that are done.
        """
        device, channels = self._moments.device, self._geometry.channels
        key = (self._kernel, self._geometry, self._form, device, kinds)
        shares = self._shares(key, machine)
        if not isinstance(shares, Teams):
            return False
        parts = counters = None
        if not shares.is_alone:
            parts = float64_scratch(self._moments, self._quantities * shares.number * channels)
        if needs_counters or not shares.is_alone:
            counters = workspace.counters(device, 2 * shares.teams + 1)
        programs = shares.number * shares.teams
        arguments = self._arguments(shares, parts, counters)
        try:
            launching.launch(self._kernel, programs, arguments, cooperative=not shares.is_alone)
        except RuntimeError as error:
            if shares.is_alone or not launching.is_too_large(error):
                raise
            _PLANS[key] = "the device did not hold its programs"  # another process or a limit takes a part of it
            return False
        return True

    def _shares(self, key: tuple[Any, ...], machine: Machine) -> Teams | str:
        """Return how the teams share out the tensors, or the reason for two launches."""
        shares = _PLANS.get(key)
        if shares is None:
            if len(_PLANS) >= _REMEMBERED:  # batches of ever new sizes
                _PLANS.clear()
            shares = teams(self._geometry, self._form, machine, None, False)
            if not isinstance(shares, Teams):
                shares = self._shares_by_registers(machine)
            _PLANS[key] = shares
        return shares

    def _shares_by_registers(self, machine: Machine) -> Teams | str:
        """Compile the kernel for teams that wait, and decide by the registers that the compiler reports."""
        number = -(-self._geometry.rows // (self._form.height * self._form.tiles))
        if not machine.cooperative or number > machine.resident(1):
            return "the machine holds no team"
        trial = Teams(self._form, number, max(2, self._geometry.groups))
        counters = torch.empty(1, dtype=torch.int32, device=self._moments.device)  # only its kind counts
        arguments = self._arguments(trial, float64_scratch(self._moments, self._quantities), counters)
        binary = launching.compiled(self._kernel, arguments, cooperative=True)
        return teams(self._geometry, self._form, machine, binary.registers, binary.spills)
