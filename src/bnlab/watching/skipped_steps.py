"""Reports every step of an optimizer, and whether a GradScaler skipped it.

A GradScaler skips a step in one of two ways. It does not call the optimizer, which the host knows because the scaler
reads from the device whether a gradient overflowed. Or a fused optimizer makes no change, which only the device knows:
the answer stays a tensor there, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from typing_extensions import Self

from bnlab.uninterrupted import SignalsHeld, finishes

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["OnStep", "SkippedSteps"]

OnStep = Callable[[Optimizer, "bool | Tensor"], None]
"""Receives an optimizer after each step, and whether the step was skipped: a tensor of shape () on a device."""

_STEP = "step"


class SkippedSteps(AbstractContextManager["SkippedSteps"]):
    """Calls a function after every step of an optimizer, also after one that the GradScaler skips.

    Several may observe one optimizer or scaler at a time, and end in any order.

    Args:
        on_step: Called with the optimizer of torch that stepped, and with whether the step was skipped. That is a bool,
            or a bool tensor of shape () where only a device knows.
        optimizer: The optimizer, or a wrapper round it that has its `param_groups`; None observes every optimizer.
        scaler: The GradScaler whose `step` may skip steps, or None. A disabled one skips none.
    """

    def __init__(
        self, on_step: OnStep, optimizer: Optimizer | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self._on_step = on_step
        self._optimizer = optimizer
        self._scaler = scaler
        self._handle: RemovableHandle | None = None
        self._observed: _ObservedStep | None = None
        self._signals = SignalsHeld()
        self.steps = 0
        """Number of calls of `Optimizer.step` so far."""

    def __enter__(self) -> Self:
        try:
            self._signals.__enter__()
            self.install()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @finishes
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove()
        finally:
            self._signals.__exit__(kind, error, trace)

    @finishes
    def install(self) -> None:
        """Begin to observe."""
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._after)
            if self._scaler is not None:
                self._observed = _observed(self._scaler)
                self._observed.observers.append(self)

    @finishes
    def remove(self) -> None:
        """End, and restore the method of the scaler. A second call does nothing."""
        if self._handle is None:
            return
        self._handle.remove()
        if self._observed is not None:
            self._observed.leave(self)
        self._handle = self._observed = None

    def observes(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer is the observed one. A wrapper shares the parameter groups of the one inside."""
        own = self._optimizer
        return own is None or own is optimizer or own.param_groups is optimizer.param_groups

    def skipped(self, optimizer: Optimizer) -> None:
        """Report a step that the scaler skipped without a call of the optimizer."""
        self._on_step(optimizer, True)

    def _after(self, optimizer: Optimizer, _args: object, _keywords: object) -> None:
        if self.observes(optimizer):
            self.steps += 1
            self._on_step(optimizer, _is_skipped(optimizer, self._scaler))


class _ObservedStep:
    """Stands for the method `step` of a GradScaler. Copies and pickles of the scaler have the method itself."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.own: Callable[..., Any] | None = vars(scaler).get(_STEP)  # what another tool has put there
        self.step: Callable[..., Any] = scaler.step
        self.observers: list[SkippedSteps] = []

    def __call__(self, optimizer: Optimizer, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - those of the step
        before = [(observer, observer.steps) for observer in self.observers if observer.observes(optimizer)]
        result = self.step(optimizer, *args, **keywords)
        for observer, steps in before:
            if observer.steps == steps and observer in self.observers:
                observer.skipped(optimizer)
        return result

    def leave(self, observer: SkippedSteps) -> None:
        """Forget an observer. The last one restores the method, unless another tool has replaced it in between."""
        self.observers.remove(observer)
        if self.observers or vars(self.scaler).get(_STEP) is not self:
            return
        if self.own is None:
            del vars(self.scaler)[_STEP]
        else:
            vars(self.scaler)[_STEP] = self.own

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (self.scaler, _STEP)


def _observed(scaler: torch.amp.GradScaler) -> _ObservedStep:
    """Return what observes the steps of a scaler, which begins if nothing does so far."""
    observed = vars(scaler).get(_STEP)
    if not isinstance(observed, _ObservedStep):
        observed = vars(scaler)[_STEP] = _ObservedStep(scaler)
    return observed


def _is_skipped(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> bool | Tensor:
    """Return whether an optimizer that the scaler has called leaves out the step because a gradient overflowed."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    overflows: Tensor | None = getattr(optimizer, "found_inf", None)
    if overflows is None:
        overflows = _recorded_overflows(optimizer, scaler)
    if overflows is None:
        return False
    skipped = overflows.sum() > 0
    return bool(skipped) if skipped.is_cpu else skipped


def _recorded_overflows(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> Tensor | None:
    """Return what the scaler has recorded for an optimizer that takes it as an argument, which torch deprecates."""
    if scaler is None or not scaler.is_enabled():
        return None
    states = scaler._per_optimizer_states  # noqa: SLF001 - a scaler has no public record of it
    recorded = states[id(optimizer)]["found_inf_per_device"] if id(optimizer) in states else {}
    values = [value.reshape(()) for value in recorded.values()]
    return torch.stack([value.to(values[0].device, non_blocking=True) for value in values]) if values else None
