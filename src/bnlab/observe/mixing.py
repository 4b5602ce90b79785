"""Measures how much the output of a sample in eval mode depends on its batch, and locates the module that mixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.observe.model_evidence import MixingModule
from bnlab.observe.passes.batches import first_samples, samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.modes import set_eval_mode
from bnlab.observe.passes.module_calls import watching_modules
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.subject import Subject
from bnlab.observe.passes.tensors import tensors_in
from bnlab.observe.transfers import to_host

__all__ = ["Mixing", "floating_outputs", "measure_mixing"]

_MAX_SAMPLES = 8
"""Number of samples of the batch on which the module is located. Every input and output is held in memory."""

_ROUNDING = 1e-3
"""Change, in standard deviations, that kernels for other batch sizes explain. On a CPU most changes are exactly 0."""


@dataclass(frozen=True)
class Mixing:
    """The dependence of a sample on its batch.

    Attributes:
        change: Largest change of an output without the other half of the batch, in standard deviations.
        module: The module that mixes the samples; None where nothing changes, or where it is not located.
    """

    change: float
    module: MixingModule | None = None


def measure_mixing(subject: Subject, data: Iterable[Batch], by_function: Mapping[str, str]) -> Mixing | None:
    """Run a batch and its first half in eval mode, and compare the outputs of the samples in both.

    Args:
        subject: The model, which is restored afterwards.
        data: Batches, of which the first is used.
        by_function: The modules that call `batch_norm` with its training flag, by path.

    Returns:
        The dependence; None where the outputs cannot be compared.
    """
    model = subject.model
    batch = next(iter(batches_of(data, model)), None)
    size = samples_in(batch)
    if size < 2:
        return None
    half = size // 2
    with subject.untouched(), torch.no_grad():
        set_eval_mode(model)
        whole, again = _outputs_on_host(subject, batch), _outputs_on_host(subject, batch)
        try:
            alone = _outputs_on_host(subject, first_samples(batch, half))
        except Exception:
            return None
        if any(not torch.equal(left, right) for left, right in zip(whole, again, strict=True)):
            return None
        changes = [
            _change(left, right, half)
            for left, right in zip(whole, alone, strict=False)
            if left.dim() and left.size(0) == size and left[:half].shape == right.shape and left.numel() > 1
            if bool(left.isfinite().all()) and bool(right.isfinite().all())
        ]
        if not changes:
            return None
        module = None
        if max(changes) > _ROUNDING:
            with suppress(Exception):
                module = _mixing_module(subject, batch, size, by_function)
    return Mixing(max(changes), module)


def floating_outputs(subject: Subject, batch: Batch) -> list[Tensor]:
    """Return every floating-point output of a model on a batch."""
    return [tensor.detach() for tensor in tensors_in(subject.run(batch)) if tensor.is_floating_point()]


def _outputs_on_host(subject: Subject, batch: Batch) -> list[Tensor]:
    return [tensor.to(torch.float64) for tensor in to_host(floating_outputs(subject, batch))]


def _change(whole: Tensor, alone: Tensor, half: int) -> float:
    return float((whole[:half] - alone).abs().max() / whole.std().clamp(min=1e-12))


def _mixing_module(subject: Subject, batch: Batch, size: int, by_function: Mapping[str, str]) -> MixingModule | None:
    """Return the first module in the order of execution whose input agrees and whose output differs."""
    size = min(size, _MAX_SAMPLES)
    half = size // 2
    whole = _calls(subject, first_samples(batch, size))
    alone = _calls(subject, first_samples(batch, half))
    for (module, *tensors), (other, *tensors_alone) in zip(whole, alone, strict=False):
        if module is not other:
            return None
        (inputs, outputs), (inputs_alone, outputs_alone) = tensors, tensors_alone
        if _agree(inputs, inputs_alone, half) and not _agree(outputs, outputs_alone, half):
            paths = {module: path for path, module in subject.model.named_modules()}
            path = paths.get(module)
            if path is None:
                return None
            return MixingModule(
                name=path,
                kind=type(module).__name__,
                is_batch_norm=isinstance(module, _BatchNorm) or path in by_function,
                is_leaf=not any(True for _ in module.children()),
            )
    return None


def _agree(whole: list[Tensor], alone: list[Tensor], half: int) -> bool:
    """Return whether the first half of the samples is the same in both, up to rounding."""
    if len(whole) != len(alone):
        return False
    for left, right in zip(whole, alone, strict=True):
        samples = left[:half] if left.dim() and left.shape[1:] == right.shape[1:] and right.size(0) == half else left
        if samples.shape != right.shape:
            return False
        if samples.numel() > 1 and not bool(
            (samples - right).abs().max() <= _ROUNDING * samples.std().clamp(min=1e-12)
        ):
            return False
    return True


_Call = tuple[nn.Module, list[Tensor], list[Tensor]]


def _calls(subject: Subject, batch: Batch) -> list[_Call]:
    """Run a batch and return every module that ran with its inputs and outputs, in the order in which they ended."""
    calls: list[_Call] = []
    entered: list[tuple[nn.Module, list[Tensor]]] = []

    def enter(module: nn.Module, arguments: object) -> None:
        entered.append((module, _copies(arguments)))  # before the module, which may change its input in place

    def leave(module: nn.Module, _: object, __: object, output: object) -> None:
        while entered:
            other, inputs = entered.pop()
            if other is module:
                calls.append((module, inputs, _copies(output)))
                return

    with watching_modules(enter, leave):
        subject.run(batch)
    return calls


def _copies(value: object) -> list[Tensor]:
    return [tensor.detach().to(torch.float64, copy=True) for tensor in tensors_in(value) if tensor.is_floating_point()]
